"""What is looked at before Ray starts: settings, the files that they name, and what the machine has for the run."""
