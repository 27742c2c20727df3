"""The self-check of the first window: does the loss of a batch equal the mean over its parts?"""
