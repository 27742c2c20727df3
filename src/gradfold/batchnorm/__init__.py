"""What plain accumulation cannot do: batches whose samples depend on each other."""
