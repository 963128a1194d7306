"""ReMix: reinforcement fine-tuning that replays its rollouts."""
