"""The doctor: runs a training script that exists, watches it for some updates, and says what is wrong with it."""
