"""The comparison of accumulation with the full batch, the hand-written loop and no accumulation at all."""

from gradfold.compare.results import Comparison as Comparison
from gradfold.compare.runner import Progress as Progress
from gradfold.compare.runner import compare as compare
from gradfold.compare.settings import Settings as Settings
