"""Around a run: where it starts or goes on, what is watched during it, what is reported after it."""
