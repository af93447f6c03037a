"""What run_spin.sh starts. Python looks in a script's folder first, and this one holds no module of a common name."""

from recipe.spin.main_spin import main

if __name__ == "__main__":
    main()
