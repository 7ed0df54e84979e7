"""Whether the services of `report_to` can take a run's logs; asked before anything is loaded."""

import os
import sys

from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

OFFLINE = ("offline", "disabled", "dryrun")


def check_reporting(args: TrainingArguments) -> None:
    """Refuse services that are unknown, not installed or, for wandb, not logged in to.

    Args:
        args: of the run; the process that logs is asked.

    Raises:
        ValueError: the sentence names the service and what to do.
    """
    names = [args.report_to] if isinstance(args.report_to, str) else args.report_to
    for name in names or ():
        try:
            kinds = get_reporting_integration_callbacks([name])
            if args.process_index == 0:
                for kind in kinds:
                    kind()
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(f"report_to={name} cannot take the logs: {error}") from error
    if "wandb" in (names or ()) and args.process_index == 0 and not _wandb_can_log_in():
        raise ValueError(
            "report_to=wandb needs a login, and there is none on this machine: run `wandb login`, set WANDB_API_KEY, or keep the "
            "logs here with WANDB_MODE=offline or report_to=tensorboard."
        )


def _wandb_can_log_in() -> bool:
    """Whether wandb has a key, needs none, or can ask for one."""
    import wandb

    if wandb.run is not None or os.environ.get("WANDB_MODE", "").lower() in OFFLINE:
        return True
    if (sys.stdin is not None and sys.stdin.isatty()) or "ipykernel" in sys.modules:
        return True
    settings = wandb.setup().settings
    return settings.mode in OFFLINE or bool(settings.identity_token_file) or bool(wandb.api.api_key)
