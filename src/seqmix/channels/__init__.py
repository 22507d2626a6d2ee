"""Channel mixers: one file per way to mix the channels of one token, which exports it as CHANNEL."""

from seqmix.channels._channel import Channel, ChannelConfig
from seqmix.core.catalog import Catalog

CHANNELS = Catalog("seqmix.channels", "CHANNEL")

__all__ = ["CHANNELS", "Channel", "ChannelConfig"]
