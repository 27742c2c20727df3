"""Verification: the proof, on a user's own model and batch, that its accumulated gradient is the whole batch's."""
