"""What a training run needs beside the trainer itself: its checkpoints' contents, its lock, its launcher."""
