"""LeRobot's warning about torchcodec as one line, once: else it brings 80 lines of tracebacks for every dataset it opens."""

import logging

FALLBACK = "torchcodec does not load here, for want of FFmpeg's libraries: videos are decoded with PyAV."


class DecoderWarning(logging.Filter):
    """Shortens the warning, and drops it from the second time on."""

    said = False
    """Whether it was logged before."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log a record."""
        if "torchcodec" not in str(record.msg) or "Falling back to 'pyav'" not in str(record.msg):
            return True
        first, self.said = not self.said, True
        record.msg, record.args = FALLBACK, ()
        return first


def shorten_decoder_warnings() -> None:
    """Install the filter where LeRobot logs; a second call changes nothing."""
    logger = logging.getLogger("lerobot.utils.import_utils")
    if not any(isinstance(known, DecoderWarning) for known in logger.filters):
        logger.addFilter(DecoderWarning())
