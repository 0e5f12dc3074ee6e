"""Training: streams and a schedule on `transformers.Trainer`."""

from fastalign.config.hub import offline

with offline():  # importing peft imports bitsandbytes, which would fetch native code from a hub
    import peft as _peft  # noqa: F401
