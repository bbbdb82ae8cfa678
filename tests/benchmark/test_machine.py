"""Description of the machine beside a measurement."""

import json

import torch

import performers
from performers import backends
from performers.benchmark.cases.floor import measure_floor
from performers.benchmark.machine import describe, parallel_info

INFO = """ATen/Parallel:
\tat::get_num_threads() : 2
\tat::get_num_interop_threads() : 1
OpenMP 201511 (a.k.a. OpenMP 4.5)
\tomp_get_max_threads() : 2
std::thread::hardware_concurrency() : 4
Environment variables:
\tOMP_NUM_THREADS : [not set]
\tMKL_NUM_THREADS : 3
ATen parallel backend: OpenMP
"""


def test_a_description_says_what_times_depend_on():
    machine = json.loads(json.dumps(describe(3)))
    assert machine["threads"] == 3
    assert machine["torch"] == torch.__version__
    assert machine["backends"] == list(backends())
    assert machine["cpu"]
    assert machine["command"]
    assert machine["native"]
    assert machine["torch_parallel"]["ATen parallel backend"]
    assert set(machine["libraries"]) > {"performer-pytorch"}


def test_the_lines_of_torch_that_matter():
    assert parallel_info(INFO) == {
        "at::get_num_interop_threads()": "1",
        "OpenMP": "201511 (a.k.a. OpenMP 4.5)",
        "omp_get_max_threads()": "2",
        "OMP_NUM_THREADS": "[not set]",
        "MKL_NUM_THREADS": "3",
        "ATen parallel backend": "OpenMP",
    }


def test_the_floor_is_the_best_of_the_rates():
    floor = measure_floor(torch.float32, 2, seconds=0.01)
    assert floor.flops_per_second == max(floor.rates.values()) > 1e6
    assert len(floor.rates) == 6 + ("native" in performers.backends())
