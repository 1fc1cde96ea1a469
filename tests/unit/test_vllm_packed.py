"""Weights that a version packs and throws away can be loaded again, and are packed anew."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lockstep.engines.worker import vllm_plugin
from lockstep.engines.worker.vllm_extension import WeightsExtension


class Layer(torch.nn.Module):
    """One product, as vLLM 0.14 makes it on a CPU."""

    def __init__(self, utils):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 3), requires_grad=False)
        self.weight.weight_loader = lambda into, loaded: into.data.copy_(loaded)
        self.quant_method = SimpleNamespace(
            process_weights_after_loading=lambda layer: utils.dispatch_cpu_unquantized_gemm(layer, True)
        )


@pytest.fixture
def utils(monkeypatch):
    """``vllm.model_executor.layers.utils`` of such a version."""
    names = ("vllm", "vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.layers.utils")
    modules = [ModuleType(name) for name in names]
    for module in modules:
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    modules[2].utils = modules[3]

    def pack(layer, remove_weight):
        packed = layer.weight.detach().clone()
        layer.cpu_linear = lambda x: x @ packed.T
        if remove_weight:
            layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    modules[3].dispatch_cpu_unquantized_gemm = pack
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return modules[3]


def test_a_layer_whose_weight_was_thrown_away_is_loaded_with_its_own_loader_and_packed_anew(utils):
    vllm_plugin._keep_loadable()
    vllm_plugin._keep_loadable()  # once in each process, however often it is asked for
    layer = Layer(utils)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.weight.numel() == 0, "no second copy of the weights is kept"
    model = torch.nn.Module()
    model.layer = layer
    model.load_weights = lambda tensors: [
        dict(model.named_parameters())[name].weight_loader(dict(model.named_parameters())[name], tensor)
        for name, tensor in tensors
    ]
    own = WeightsExtension()
    own.model_runner = SimpleNamespace(get_model=lambda: model, reload_weights=lambda: None)
    x = torch.ones(1, 3)
    assert layer.cpu_linear(x).tolist() == [[3.0, 3.0]]
    for value in (2.0, 5.0):
        own.lockstep_deliver(iter([("layer.weight", torch.full((2, 3), value))]))
        assert layer.cpu_linear(x).tolist() == [[3.0 * value] * 2]
        assert layer.weight.numel() == 0


def test_where_the_engines_own_reload_makes_parameters_anew_nothing_is_kept(utils, monkeypatch):
    original = utils.dispatch_cpu_unquantized_gemm
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    vllm_plugin._keep_loadable()
    assert utils.dispatch_cpu_unquantized_gemm is original
