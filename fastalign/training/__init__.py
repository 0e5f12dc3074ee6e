"""Training: streams and a schedule on `transformers.Trainer`."""

import logging as _logging

from fastalign.config.hub import offline
from fastalign.errors import ConfigError as _ConfigError

_loggers = [_logging.getLogger(_name) for _name in ("bitsandbytes", "kernels")]
_levels = [_logger.level for _logger in _loggers]
for _logger in _loggers:  # they warn of the native code that they cannot have
    _logger.setLevel(_logging.ERROR)
try:
    with offline():  # importing peft imports bitsandbytes, which would fetch native code from a hub
        import peft as _peft  # noqa: F401
except Exception as _error:  # a library of native code that is broken raises anything at all
    _frame = _error.__traceback__
    while _frame is not None and _frame.tb_next is not None:
        _frame = _frame.tb_next
    _where = _frame.tb_frame.f_globals.get("__name__", "peft").partition(".")[0] if _frame else "peft"
    _why = " ".join(f"{type(_error).__name__}: {_error}".split())
    raise _ConfigError(f"peft cannot be loaded ({_why}, in {_where}); see: fastalign doctor") from _error
finally:
    for _logger, _level in zip(_loggers, _levels, strict=True):
        _logger.setLevel(_level)
