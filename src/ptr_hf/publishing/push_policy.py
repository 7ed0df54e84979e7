"""A policy on the Hub without a run: its files, and a card that says what is known of it."""

import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lerobot.processor import PolicyProcessorPipeline

from ptr_hf.artifacts.processor_checks import PROCESSOR_FILES
from ptr_hf.publishing.model_card import policy_facts, write_model_card
from ptr_hf.publishing.push import Destination, local_needs
from ptr_hf.report.files import beside_the_run

logger = logging.getLogger(__name__)


def push_policy(
    policy: Any,
    destination: Destination,
    *,
    processors: Sequence[PolicyProcessorPipeline] = (),
    license: str | None = None,
    message: str = "Upload policy",
    tags: Sequence[str] = (),
) -> str:
    """Save a `PTRPolicy` with a card and push it in one commit.

    Args:
        policy: a `PTRPolicy`.
        destination: repo, branch and token.
        processors: its pre- and postprocessor, without which a robot cannot run it.
        license: for the card.
        message: of the commit.
        tags: git tags to set on it.

    Returns:
        the address of the commit.

    Raises:
        PushError: it did not get through; the folder that the message names stays.
    """
    folder = Path(tempfile.mkdtemp(prefix="ptr_push_"))
    policy.save_pretrained(folder)
    for name, processor in zip(PROCESSOR_FILES, processors, strict=False):
        processor.save_pretrained(folder, config_filename=name)
    destination = destination.create(folder)
    with beside_the_run("The card could not be written"):
        write_model_card(policy_facts(policy, license=license, repo_id=destination.repo_id), folder)
    for sentence in local_needs(folder):
        logger.warning("%s", sentence)
    address = str(destination.push(folder, message, tags=tags).commit_url)
    shutil.rmtree(folder, ignore_errors=True)
    return address
