"""What a training run leaves to look at: its dynamics, figures, detection of known corruptions, and one HTML page."""
