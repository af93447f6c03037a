"""`python -m recipe.spin.doctor`: whether this machine can train, and does it right (tools/doctor.py)."""

from recipe.spin.tools.doctor import main

if __name__ == "__main__":
    main()
