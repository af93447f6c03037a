"""To be imported before Ray's classes are declared in a process that others are forked from (worker_forks.py)."""

from recipe.spin import verl_patches

verl_patches.draw_class_ids_from_the_system()
