"""ReMix: reinforcement fine-tuning that replays its rollouts."""

__version__ = "0.1.0"
