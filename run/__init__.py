"""Around a run: what is checked before it, what is watched during it, what is reported after it."""
