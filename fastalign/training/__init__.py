"""Training: streams and a schedule on `transformers.Trainer`."""

import logging as _logging

from fastalign.config.hub import offline

_loggers = [_logging.getLogger(_name) for _name in ("bitsandbytes", "kernels")]
_levels = [_logger.level for _logger in _loggers]
for _logger in _loggers:  # they warn of the native code that they cannot have
    _logger.setLevel(_logging.ERROR)
try:
    with offline():  # importing peft imports bitsandbytes, which would fetch native code from a hub
        import peft as _peft  # noqa: F401
finally:
    for _logger, _level in zip(_loggers, _levels, strict=True):
        _logger.setLevel(_level)
