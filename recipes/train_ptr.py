"""Post-train a LeRobot policy with Posterior-Transition Reweighting: the command `ptr-train`, for `accelerate launch`.

accelerate launch recipes/train_ptr.py --policy_path lerobot/smolvla_base --dataset me/my_demos --output_dir out
"""

from ptr_hf.cli.train import main

if __name__ == "__main__":
    main()
