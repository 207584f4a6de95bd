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
from slm_begin.supernet import NotASupernet, Subnet, SubnetError, Supernet, config_sizes, load_model, save_student

every = pytest.mark.parametrize('family', FAMILIES)
a_few = pytest.mark.parametrize('family', ['gpt_neox', 'llama', 'gemma2', 'gpt2', 'opt', 'phi3'])      # renamed keys, groups, tied, transposed, learned positions, fused


def same(a, b):
    "Are all weights and buffers of two models the same, by the same names?"
    tensors = [dict([*m.named_parameters(remove_duplicate=False), *m.named_buffers()]) for m in (a, b)]
    return tensors[0].keys()==tensors[1].keys() and all(t.dtype==tensors[1][n].dtype and torch.equal(t, tensors[1][n]) for n, t in tensors[0].items())

def said(model):
    "What its config says of its shape."
    return getattr(model.config, 'subnet', None) or config_sizes(model.config)

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

def cuts_like(student, net, a, cuts):
    "Is `student` the sub-network `a` of `net`, and does it give what `net` gives directly?"
    assert student.full.sizes=={**a.sizes, 'layers': [*range(len(a.layers))]}
    assert student.count(student.full)==net.count(a) and student.flops(student.full, 16)==net.flops(a, 16)
    for b in cuts:
        got, direct = student.extract(b), net.extract(through(a, b))
        assert student.count(b)==net.count(through(a, b))==student.init(b).num_parameters()
        assert same(got, direct) and said(got)==said(direct) and torch.equal(logits(got), logits(direct))

@every
def test_a_student_of_a_student_is_one_of_the_teacher(family, tmp_path):
    "Saved, and left on disk."
    net, rng = tiny(family), random.Random(5)
    a = random_subnet(net, rng)
    save_student(net.extract(a), tmp_path)
    student = Supernet.from_disk(tmp_path)
    cuts_like(student, net, a, [student.full, random_of(student, rng)])

@a_few
def test_grandchildren(family, tmp_path):
    "Through students in memory and loaded ones, with shapes that the family can say and others; the last one is saved too."
    net, rng = tiny(family), random.Random(6)
    for i, a in enumerate([random_subnet(net, rng), net.subnet(embd=net.sizes['embd'] // 2, heads=net.sizes['heads'] // 2, ffn=24)]):
        save_student(net.extract(a), tmp_path/f'{i}')
        for student in Supernet(net.extract(a)), Supernet(load_model(tmp_path/f'{i}')):
            e, h = student.sizes['embd'] // 2 or 1, min(map(len, student.full.heads))
            cuts_like(student, net, a, [random_of(student, rng), student.subnet(1), student.subnet(embd=e), student.subnet(1, embd=range(e), heads=h)])
        b = random_of(student, rng)
        save_student(student.extract(b), tmp_path/f'{i}{i}')
        last = Supernet(load_model(tmp_path/f'{i}{i}'))
        cuts_like(last, net, through(a, b), [last.full, random_of(last, rng)])

def test_layers_of_different_sizes_are_checked_one_by_one():
    net = tiny('llama')
    student = Supernet(net.extract(net.subnet([0, 2], 20, (1, 2), ([3, 1, 5], 12))))
    assert student.sizes==dict(layers=2, embd=20, heads=2, ffn=12, vocab=96) and student.full.sizes==dict(layers=[0, 1], embd=20, heads=[1, 2], ffn=[3, 12])
    assert student.subnet(heads=(1, 2), ffn=[[2, 0], [11]]).sizes['ffn']==[2, 1]
    for kw, why in (dict(heads=2), '`heads` of layer 0: cannot keep 2; the teacher has 1'), (dict(ffn=(3, [12])), '`ffn` of layer 1.*12 is not there.*the teacher has 12'):
        with pytest.raises(SubnetError, match=why): student.subnet(**kw)
    with pytest.raises(SubnetError, match='`ffn` of layer 0.*the teacher has 3'): student.count(Subnet((0,), (0,), ((0,),), ((0, 3),)))
    assert student.count(Subnet((1,), (0,), ((0,),), ((0, 3),))) > 0

def test_what_needs_layers_of_one_size_says_so():
    net = tiny('llama')
    student = Supernet(net.extract(net.subnet(heads=(1, 2, 2))))
    for use in lambda: SearchSpace(student, round_to=dict(embd=8, ffn=8)), lambda: measure(student, ids()):
        with pytest.raises(ValueError, match='layers of different sizes'): use()
