"supernet: students that are teachers again, teachers that stay on disk, and students where there is no slm_begin."
import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from test_families import FAMILIES, ids, logits, random_subnet, tiny

from slm_begin.importance import measure
from slm_begin.space import SearchSpace
from slm_begin.supernet import NotASupernet, Subnet, SubnetError, Supernet, load_model, save_student

every = pytest.mark.parametrize('family', FAMILIES)
a_few = pytest.mark.parametrize('family', ['gpt_neox', 'llama', 'gemma2', 'gpt2', 'opt', 'phi3'])      # renamed keys, groups, tied, transposed, learned positions, fused


def same(a, b):
    "Are all weights and buffers of two models the same, by the same names?"
    tensors = [dict([*m.named_parameters(remove_duplicate=False), *m.named_buffers()]) for m in (a, b)]
    return tensors[0].keys()==tensors[1].keys() and all(t.dtype==tensors[1][n].dtype and torch.equal(t, tensors[1][n]) for n, t in tensors[0].items())

def through(a, b):
    "The sub-network of the teacher that is sub-network `b` of its sub-network `a`."
    pick = lambda of, ids: tuple(of[i] for i in ids)
    inside = lambda axis: tuple(pick(getattr(a, axis)[l], ids) for l, ids in zip(b.layers, getattr(b, axis)))
    return Subnet(pick(a.layers, b.layers), pick(a.embd, b.embd), inside('heads'), inside('ffn'))

def random_of(net, rng):
    "As `random_subnet`, where each layer has sizes of its own."
    some = lambda n: rng.sample(range(n), rng.randint(1, n))
    layers = sorted(some(net.sizes['layers']))
    return net.subnet(layers, some(net.sizes['embd']), *(tuple(some(net.size(axis, l)) for l in layers) for axis in ('heads', 'ffn')))


# A student can be a teacher again

@every
def test_a_student_of_a_student_is_one_of_the_teacher(family, tmp_path):
    "Whether the first student is in memory, loaded, or left on disk; and loaded once more."
    net, rng = tiny(family), random.Random(5)
    a = random_subnet(net, rng)
    save_student(net.extract(a), tmp_path/'a')
    for student in Supernet(net.extract(a)), Supernet(load_model(tmp_path/'a')), Supernet.from_disk(tmp_path/'a'):
        assert student.full.sizes=={**a.sizes, 'layers': [*range(len(a.layers))]} and student.count(student.full)==net.count(a)
        assert student.flops(student.full, 16)==net.flops(a, 16) and same(student.extract(student.full), net.extract(a))
        for b in random_of(student, rng), student.subnet(layers=1), student.subnet(embd=range(len(a.embd) // 2 or 1)):
            direct = net.extract(through(a, b))
            assert student.count(b)==net.count(through(a, b))==student.init(b).num_parameters()
            got = student.extract(b)
            assert same(got, direct) and torch.equal(logits(got), logits(direct))
            assert got.config.to_diff_dict()==direct.config.to_diff_dict()
    save_student(got, tmp_path/'b')
    assert torch.equal(logits(load_model(tmp_path/'b')), logits(direct))
