"""Keys of batches that several folders read, beside LeRobot's own in `lerobot.utils.constants`."""

ACTION_PAD = "action_is_pad"
"""(batch, steps), True where a step of the chunk lies outside its episode."""
ACTION_DIM_PAD = "action_dim_is_pad"
"""(batch, dims), True where a row's robot lacks an action dimension; absent where every dimension counts."""
