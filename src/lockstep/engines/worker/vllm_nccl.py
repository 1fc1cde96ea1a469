"""Receive weights over NCCL through vLLM's weight-transfer API.

As it is in vllm/distributed/weight_transfer, read at 0.18.1 and 0.32.0.

0.32 takes the communicator's unique id as it is; 0.18 meets over a TCP store, on the loopback, where this
process stands in for rank 0: it hands out the id that the trainer minted, and takes no part in the
broadcasts.
"""

import base64
import dataclasses
import threading
from typing import Any

from lockstep.records.versions import NcclBroadcast

RANK_OFFSET = 1
"""The trainer is rank 0."""


def init_info(offer: NcclBroadcast) -> dict[str, Any]:
    """What ``init_weight_transfer_engine`` is given, in this version's terms."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    known = {field.name for field in dataclasses.fields(NCCLWeightTransferEngine.init_info_cls)}
    info: dict[str, Any] = {"rank_offset": RANK_OFFSET, "world_size": offer.world_size}
    if "nccl_unique_id_b64" in known:
        return info | {"nccl_unique_id_b64": base64.b64encode(offer.unique_id).decode()}
    from vllm.utils.network_utils import get_open_port

    port = get_open_port()
    threading.Thread(target=hand_out, args=(offer, port), daemon=True).start()
    return info | {"master_address": "127.0.0.1", "master_port": port}


def hand_out(offer: NcclBroadcast, port: int) -> Any:
    """Be rank 0 of the store for as long as the id is asked for.

    Returns the group, which keeps the store alive.
    """
    from vllm.distributed.device_communicators.pynccl_wrapper import ncclUniqueId
    from vllm.distributed.utils import StatelessProcessGroup

    group = StatelessProcessGroup.create(host="127.0.0.1", port=port, rank=0, world_size=offer.world_size)
    group.broadcast_obj(ncclUniqueId.from_buffer_copy(offer.unique_id), src=0)
    _kept.append(group)
    return group


_kept: list[Any] = []


def update_info(offer: NcclBroadcast) -> dict[str, Any]:
    """What ``update_weights`` is given."""
    return {
        "names": list(offer.names),
        "dtype_names": list(offer.dtype_names),
        "shapes": [list(shape) for shape in offer.shapes],
    }


class NcclReceiver:
    """The engine's side of the syncs of one run."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self._joined = b""

    async def receive(self, offer: NcclBroadcast, version: int) -> int:
        """Join on the first update, then receive one version. Returns how many tensors."""
        from vllm.distributed.weight_transfer.base import (
            WeightTransferInitRequest,
            WeightTransferUpdateRequest,
        )

        if self._joined != offer.unique_id:
            await self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info(offer)))
            self._joined = offer.unique_id
        phased = hasattr(self.llm, "start_weight_update")
        if phased:
            await self.llm.start_weight_update()
        await self.llm.update_weights(WeightTransferUpdateRequest(update_info=update_info(offer)))
        if phased:
            await self.llm.finish_weight_update(weight_version=str(version))
        return len(offer.names)
