"""What a training imports of the reward service: pictures to servers, results in order."""

from reward_server.client.client import (
    TOKEN_VARIABLE,
    RewardClient,
    RewardItem,
    RewardResult,
    encode_png,
    server_urls,
)
from reward_server.client.failover import (
    RewardClientError,
    RewardRejectedError,
    RewardUnavailableError,
)

__all__ = [
    "TOKEN_VARIABLE",
    "RewardClient",
    "RewardClientError",
    "RewardItem",
    "RewardRejectedError",
    "RewardResult",
    "RewardUnavailableError",
    "encode_png",
    "server_urls",
]
