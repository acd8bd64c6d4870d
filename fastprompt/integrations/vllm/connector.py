"""The KV connector: keys and values of compiled prompts are put into vLLM's cache, before a request is computed.

The scheduler's half decides which prompt a request has, and says how many of its tokens need not be computed; the
workers' half writes them into the blocks that vLLM has given the request.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.logger import init_logger

from .layers import PromptLayers, check_shapes
from .prompts import PromptError, PromptInfo
from .requests import prompt_folder
from .supported import check_engine, prompt_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = init_logger("vllm.fastprompt")  # below vLLM's own logger, which decides where messages go


@dataclass
class Load:
    """What one request needs written.

    Attributes:
        request_id: of the request.
        prompt: whose keys and values.
        places: of each group of layers: which virtual tokens, and the slot of the cache that each goes to.
    """

    request_id: str
    prompt: PromptInfo
    places: list[tuple[list[int], list[int]]]


@dataclass
class Loads(KVConnectorMetadata):
    """What the scheduler tells the workers in one step."""

    loads: list[Load] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@dataclass
class Shapes(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler of its layers when it starts."""

    shapes: dict[int, tuple[list[int], list[int]]]


class FastPromptConnector(KVConnectorBase_V1, SupportsHMA):
    """Serves compiled prompts by name, at ``kv_connector_extra_config["prompts"]``: a folder.

    A request that cannot be served as it is fails with the finish reason "error", and the log has why: to the
    scheduler it is a load that takes a step, and of which the workers then report that it failed.
    """

    _layers: PromptLayers  # in a worker, once it has its caches

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_engine(vllm_config, kv_cache_config)
        self._prompts = prompt_folder(self._kv_transfer_config)
        self._accepted: dict[str, PromptInfo] = {}  # of requests that have not finished
        self._refused: dict[str, str] = {}
        self._compared: set[str] = set()  # digests of prompts
        self._step = Loads()  # of the step that is being scheduled
        self._shapes: dict[int, tuple[list[int], list[int]]] = {}  # of all workers' layers
        self._null_block = 0
        self._failed_requests: set[str] = set()
        self._failed_blocks: set[int] = set()

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # nothing is handed on when a request finishes

    # The scheduler's half.

    def bind_gpu_block_pool(self, gpu_block_pool: "BlockPool") -> None:
        self._null_block = gpu_block_pool.null_block.block_id

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        for worker in metadata.values():
            self._shapes.update(worker.shapes)

    def on_new_request(self, request: "Request") -> None:
        """Decide once: a file that is replaced while a request waits does not change what the request is."""
        try:
            info = prompt_of(request, self._prompts)
            if info is not None:
                check_shapes(info, self._shapes)
        except PromptError as error:
            logger.error("Request %s is refused: %s", request.request_id, error)
            self._refused[request.request_id] = str(error)
            request.skip_reading_prefix_cache = False  # or the scheduler would not ask for its tokens
            return
        if info is not None:
            self._accepted[request.request_id] = info
            self._compare_names(info)

    def _compare_names(self, info: PromptInfo) -> None:
        """Weights cannot be compared here; a name of another model may be one of the same at another place."""
        theirs, ours = info.metadata.get("base_model", ""), self._vllm_config.model_config.model
        if info.digest not in self._compared and Path(theirs).name not in ("", Path(ours).name):
            logger.warning("Prompt %r was compiled for %r; this engine runs %r", info.name, theirs, ours)
        self._compared.add(info.digest)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int, bool]:
        if request.request_id in self._refused:
            return request.num_tokens - num_computed_tokens, True
        info = self._accepted.get(request.request_id)
        return (0 if info is None else max(0, info.length - num_computed_tokens)), False

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Note what is to be written: for a new request, and again for one that was preempted."""
        if request.request_id in self._refused:
            self._step.refused.append(request.request_id)
        elif num_external_tokens > 0:
            info = self._accepted[request.request_id]
            tokens = range(info.length - num_external_tokens, info.length)  # those before are in the prefix cache
            places = [
                self._places(tokens, ids, group.kv_cache_spec.block_size)
                for ids, group in zip(blocks.get_block_ids(), self._kv_cache_config.kv_cache_groups)
            ]
            self._step.loads.append(Load(request.request_id, info, places))

    def _places(self, tokens: range, block_ids: list[int], block_size: int) -> tuple[list[int], list[int]]:
        """Tokens that no sliding window will reach have no block."""
        rows = [row for row in tokens if block_ids[row // block_size] != self._null_block]
        return rows, [block_ids[row // block_size] * block_size + row % block_size for row in rows]

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> Loads:
        step, self._step = self._step, Loads()
        return step

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._accepted.pop(request.request_id, None)
        self._refused.pop(request.request_id, None)
        return False, None

    # The workers' half.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._layers = PromptLayers(self._vllm_config, self._kv_cache_config)

    def get_handshake_metadata(self) -> Shapes:
        return Shapes(self._layers.shapes())

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        step = self._get_connector_metadata()
        self._failed_requests.update(step.refused)
        for load in step.loads:
            try:
                self._layers.write(self._prompts.layers(load.prompt), load.places)
            except PromptError as error:
                logger.error("Request %s fails: %s", load.request_id, error)
                self._fail(load)

    def _fail(self, load: Load) -> None:
        """The forward still runs, on whatever stands in the blocks; the scheduler drops the blocks and the request."""
        groups = self._kv_cache_config.kv_cache_groups
        if len(groups) > 1:
            raise RuntimeError("a prompt was lost, and vLLM cannot fail a single request where layers are in groups")
        block_size = groups[0].kv_cache_spec.block_size
        self._failed_blocks.update(slot // block_size for slot in load.places[0][1])

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        failed, self._failed_requests = self._failed_requests, set()
        return KVConnectorTransferResults(finished_recving=set(failed), failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a load is on the device's queue before the forward is."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""
