"""Losses over a whole batch that need less memory than they would in one piece, with exact gradients of their own."""

from gradfold.losses.info_nce import info_nce as info_nce
