"""The cases of the suite, a file for each subject."""
