"""The version of gradfold, which parts of it write down beside what they find out."""

__version__ = "0.1.0.dev0"
