"""Train, evaluate and explain image classifiers, one recipe at a time; no Ray in here."""
