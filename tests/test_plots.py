"plots: figures of searches at their edges: one candidate, none that worked, one seed, many layers, words that somebody else has written."
from html.parser import HTMLParser

import numpy as np
import pytest

from slm_begin.plots import (
    genealogy_html,
    plot_agreement,
    plot_arms,
    plot_convergence,
    plot_curves,
    plot_differences,
    plot_front,
    plot_methods,
    plot_proxy,
    plot_search,
    plot_spaces,
    plot_sweeps,
    plot_texts,
    plot_trend,
    rank_correlation,
)

BIN = dict(low=900, high=1100)
HOSTILE = '<img src=x onerror=alert(1)> & "$\\frac{$ \''

def line(i, loss=4., parents=(), **more):
    sizes = dict(layers=[0, 2], embd=16, heads=[1, 2], ffn=[8, 24])
    return dict(index=i, generation=i // 2, origin='sample', parents=list(parents), key=f'k{i}', parameters=1000 + i, loss=loss,
                tokens=10, flops=1e6, sizes=sizes, **more)

def failed(i): return line(i, None, error='out of memory')

def drawn(fig):
    "Really drawn: a PNG."
    assert fig._repr_png_().startswith(b'\x89PNG')
    return fig

def points(artist): return np.asarray(artist.get_offsets()).tolist()

@pytest.mark.parametrize('plot', [lambda h: plot_search(h, BIN), plot_front, plot_agreement])
def test_one_candidate_is_enough_and_none_is_an_error(plot):
    drawn(plot([line(0)]))
    drawn(plot([failed(0), line(1), failed(2)]))
    with pytest.raises(ValueError, match='history is empty'): plot([])
    with pytest.raises(ValueError, match="none of the 2 candidates has a loss, and the first error is 'out of memory'"): plot([failed(0), failed(1)])

def test_search_leaves_out_what_failed_and_draws_differently_who_was_read_in_part():
    history = [line(0, 5., pieces=16), line(1, 6., pieces=4), failed(2) | dict(pieces=0), line(3, 4., pieces=16), line(4, float('nan'), pieces=16)]
    fig = drawn(plot_search(history, BIN))
    in_part, in_full = fig.axes[0].collections[:2]
    assert points(in_part)==[[1001, 6]] and points(in_full)==[[1000, 5], [1003, 4]]
    assert fig.alt.startswith('3 candidates') and fig.alt.endswith('Read in part only: 1. Failed and not drawn: 2.')

def step_line(fig): return [np.asarray(v).tolist() for v in fig.axes[0].lines[0].get_data()]

def test_convergence_adds_up_where_a_history_does_not_know_its_totals():
    history = [failed(0), line(1, 5.), line(2, 6.), line(3, 4.)]
    assert step_line(drawn(plot_convergence(dict(a=history))))==[[20, 30, 40], [5, 5, 4]]
    assert step_line(plot_convergence(dict(a=history), x='flops'))[0]==[2e6, 3e6, 4e6]

def test_convergence_believes_the_totals():
    known = [(100, None), (100, None), (250, 3.5)]
    history = [line(i, total_tokens=t, total_flops=t * 7, best=best) for i, (t, best) in enumerate(known)]
    assert step_line(plot_convergence(dict(a=history)))==[[250], [3.5]]
    assert step_line(plot_convergence(dict(a=history), x='flops'))==[[1750], [3.5]]

def test_convergence_over_seeds():
    seeds = [[line(0, 5.), line(1, 4.)], [line(0, 7.), line(1, 6.), line(2, 2.)]]
    fig = drawn(plot_convergence(dict(a=seeds)))
    assert step_line(fig)==[[10, 20, 30], [6, 5, 3]]
    assert fig.alt=='Best loss found: a 3.000 after 30 tokens (mean of 2 seeds, 2.000 to 4.000).'
    one = plot_convergence(dict(a=seeds[:1]))                                       # a list of one history is that history, without a band
    assert one.alt==plot_convergence(dict(a=seeds[0])).alt and not one.axes[0].collections
    assert plot_convergence(dict(a=[[], seeds[0], [failed(0)]])).alt==one.alt       # seeds that have found nothing

def test_convergence_is_logarithmic_only_if_searches_differ_much():
    cheap = [line(0, 5.)]
    scale = lambda n: drawn(plot_convergence(dict(cheap=cheap, dear=[line(i) for i in range(n)]))).axes[0].get_xscale()
    assert scale(20)=='linear' and scale(21)=='log'

def test_convergence_errors():
    with pytest.raises(ValueError, match='no candidate with a loss'): plot_convergence(dict(a=[failed(0)], b=[[failed(0)], []]))
    with pytest.raises(ValueError, match="history of 'a' says neither `total_flops` nor `flops`"):
        plot_convergence(dict(a=[dict(loss=1., tokens=1)]), x='flops')

def test_front():
    history = [line(i, loss, objectives=dict(kv_bytes=kv)) for i, (loss, kv) in enumerate([(5., 1), (4., 3), (3., 2), (6., 4)])] + [failed(4)]
    fig = drawn(plot_front(history, 'kv_bytes', {'k0', 'k2'}))
    assert points(fig.axes[0].collections[0])==[[3, 4], [4, 6]]
    assert step_line(fig)==[[1, 2], [5, 3]] and fig.axes[0].get_xlabel()=='bytes of KV cache a token'
    assert drawn(plot_front(history, 'kv_bytes')).alt.endswith(': 0 of 4 candidates.')          # no front known
    assert step_line(drawn(plot_front(history, 'kv_bytes', {'k0', 'k1', 'k2'})))[1]==[5, 3, 3]      # on the front for a third wish: never upwards
    with pytest.raises(ValueError, match="`front` has 'k4', which is no candidate of the history with a loss"): plot_front(history, front={'k4'})
    with pytest.raises(ValueError, match="`x` is 'memory', which candidate 'k0' has no number for; it has parameters, kv_bytes"): plot_front(history, 'memory')

def test_proxy():
    rows = [dict(before=6. + i, short=5. + i, after=4. + i, layers=i) for i in range(16)]       # more numbers of layers than there are looks
    fig = drawn(plot_proxy(rows, (.5, float('nan'))))
    assert len(fig.axes[0].collections)==16 and 'ρ = 0.50' in fig.axes[0].get_title(loc='left')
    assert drawn(plot_proxy(rows[:1], (1, 1))).alt.endswith('Sub-networks: 1.')
    with pytest.raises(ValueError, match='row 1 has no number for `after`'): plot_proxy([rows[0], rows[1] | dict(after=None)], (1, 1))
    with pytest.raises(ValueError, match='`rows` is empty'): plot_proxy([], (1, 1))

def test_agreement_of_uniform_and_of_uneven_sizes():
    uniform = line(0, 3.) | dict(sizes=dict(layers=[1, 30], embd=64, heads=4, ffn=128))
    uneven = line(1, 4.) | dict(sizes=dict(layers=[0, 30], embd=96, heads=[1, 8], ffn=[32, 256]))
    out = line(2, 9.) | dict(sizes=dict(layers=[5], embd=8, heads=1, ffn=1))
    fig = drawn(plot_agreement([out, uneven, uniform], 2))
    assert fig.alt=='The best 2: all keep layer 30 of 31; width 64 to 96.'
    layers, heads = fig.axes[:2]
    assert [b.get_height() for b in layers.patches]==[1, 1, *[0] * 28, 2]
    assert [v.tolist() for v in heads.lines[0].get_data()]==[[0, 1, 30], [1, 4, 6]]
    teacher = dict(layers=32, embd=128, heads=[8] * 32, ffn=512)
    assert 'of 32' in drawn(plot_agreement([uniform], teacher=teacher)).alt
    assert drawn(plot_agreement([uniform, uneven, out], 3)).alt.startswith('The best 3: no layer is kept by all of 31')

def test_methods():
    fig = drawn(plot_methods(dict(b=[4., 5., 6.], a=[3.], none=[], broken=[None, float('inf')]), dict(b=2e12)))
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()]==['b', 'a', 'none', 'broken (2 failed)']      # as given, not sorted
    assert fig.alt=='Loss (nats a token): b 5.000 ± 1.000 over 3 seeds, 2 TFLOP; a 3.000; none no result; broken no result, 2 failed.'
    with pytest.raises(ValueError, match='no loss for any of its 2 names'): plot_methods(dict(a=[], b=[None]))
    with pytest.raises(ValueError, match='no loss for any of its 0 names'): plot_methods({})

def test_names_are_only_text():
    drawn(plot_methods({HOSTILE: [1., 2.]}, {HOSTILE: 1e9}, label=HOSTILE))
    drawn(plot_convergence({HOSTILE: [line(0)]}))
    drawn(plot_front([line(0, objectives={HOSTILE: 1})], HOSTILE, {'k0'}))

class Page(HTMLParser):
    "Balanced tags; which there are, and the text."
    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], ''
        self.feed(page)
        assert not self.open
    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append(tag)
        assert {a for a, _ in attrs} <= {'style'}
    def handle_endtag(self, tag): assert self.open.pop()==tag
    def handle_data(self, data): self.text += data

def test_genealogy_escapes_everything():
    sizes = dict(layers=[HOSTILE], embd=HOSTILE, heads=[HOSTILE, 'a'], ffn=HOSTILE)
    child = line(1, parents=[HOSTILE, '<b>']) | dict(origin=HOSTILE, generation=HOSTILE)
    page = Page(genealogy_html([line(0) | dict(key=HOSTILE, sizes=sizes), child], 'k1'))
    assert set(page.tags)=={'ul', 'li', 'code', 'span'}
    assert page.text.count(HOSTILE)==6                                              # origin, generation, four sizes; keys are cut short
    assert '<b>, not in this history' in page.text

def chain(n): return [line(i, parents=[f'k{i - 1}'] if i else []) | dict(origin='mutate' if i else 'given') for i in range(n)]

def test_genealogy_is_limited():
    text = Page(genealogy_html(chain(10), 'k9', 6)).text
    assert 'k3 ' in text and 'k2 ' not in text and text.count('older ancestors are not shown')==1
    text = Page(genealogy_html(chain(7), 'k6', 6)).text
    assert 'k0 given' in text and 'older' not in text
    Page(genealogy_html(chain(1000), 'k999', 50))
    for depth in 0, 51:
        with pytest.raises(ValueError, match=f'`depth` is {depth}; it must lie between 1 and 50'): genealogy_html(chain(2), 'k1', depth)
    with pytest.raises(ValueError, match='`key` is \'x\', which is none of the 2 candidates'): genealogy_html(chain(2), 'x')

def test_genealogy_names_each_ancestor_once_and_where_it_is_nearest():
    history = [line(0), line(1, parents=['k0']), line(2, parents=['k1', 'k0']), failed(3) | dict(parents=['k2', 'k0', 'k0'])]
    page = genealogy_html(history, 'k3')
    text = Page(page).text
    assert text.count('loss 4.000')==3 and text.count('k0, which stands elsewhere')==2
    assert page.alt=='sample, generation 1, failed; ancestors within 6 steps: 3'
    circle = [line(0, parents=['k1']), line(1, parents=['k0', 'k1'])]               # no search writes this; a file may
    assert Page(genealogy_html(circle, 'k0')).text.count('loss')==2

# --- studies

def run(seed, loss, **more):
    return dict(seed=seed, final_loss=loss, curve=[dict(tokens=t, flops=1e9 * t + 1e10 * seed, valid_loss=l) for t, l in ((0, 8.), (10, loss))],
                tokens_gain=2., flops_gain=.5, cost=dict(student=1e10), test=dict(valid=loss)) | more

def arm(title, *runs, **more): return dict(title=title, runs=list(runs), lr=1e-3, sweep=[]) | more

def cell(tokens=100, **arms): return dict(tokens=tokens, bin=dict(low=90, high=110), teacher=dict(parameters=1000, test={}), reference='base/a', arms=arms)

def texts(ax): return [t.get_text() for t in ax.texts]

def test_curves_of_seeds_have_a_band_and_one_seed_has_none():
    two = plot_curves([arm('A', run(1, 4.), run(2, 5.))], x='flops')
    x, y = two.axes[0].lines[0].get_data()
    assert list(x)==[1.5e10, 2.5e10] and y[1]==pytest.approx(np.exp(4.5)) and len(two.axes[0].collections)==1
    assert drawn(two).alt.endswith('A 2981.0 at its start and 90.0 after 25 G flops (mean of 2 seeds, 54.6 to 148.4).')
    one = plot_curves([arm('A', run(1, 4.))])
    assert one.alt==plot_curves([dict(title='A', curve=run(1, 4.)['curve'])]).alt and not one.axes[0].collections
    with pytest.raises(ValueError, match="'A' has 2 runs that were not evaluated after the same tokens"):
        plot_curves([arm('A', run(1, 4.), run(2, 4.) | dict(curve=[dict(tokens=0, flops=0, valid_loss=8.)]))])
    with pytest.raises(ValueError, match="'A' has 0 runs"): plot_curves([arm('A')])

def test_arms_say_never_and_at_once():
    odd = arm('B', *(run(i, 4., tokens_gain=g) for i, g in enumerate((None, 'at once', 3., 5.))))
    fig = drawn(plot_arms(cell(a=arm('A', run(0, 5.)), b=odd)))
    perplexities, tokens, flops = fig.axes
    assert texts(tokens)==['2.00×', 'never'] and texts(flops)==['0.50×'] * 2 and texts(perplexities)==['148.4', '54.6']
    crosses, triangles = ([list(l.get_xdata()) for l in tokens.lines if l.get_marker()==m and len(l.get_xdata())] for m in 'x>')
    assert crosses==[[.02]] and triangles==[[.98]]
    assert fig.alt.endswith('B perplexity 54.6, never in tokens, 0.50× in FLOPs.')
    for given, word in ((None, 2.), 'never'), (('at once', 2.), '≥2.00×'), (('at once',), 'at once'), ((2., 8.), '4.00×'):
        runs = [run(i, 5., tokens_gain=g) for i, g in enumerate(given)]
        assert f'{word} in tokens' in drawn(plot_arms(cell(a=arm('A', *runs)))).alt

def test_arms_that_have_not_ended_are_left_out():
    fig = drawn(plot_arms(cell(a=arm('A', run(0, None), run(1, 5.)), b=arm('B'), c=arm('C', run(0, float('nan'))))))
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()]==['A']

def test_trend_is_sorted_leaves_the_reference_without_gains_and_bears_missing_arms():
    cells = [cell(400, a=arm('A', run(0, 4.)), b=arm('B', run(0, 3.))), cell(100, a=arm('A', run(0, 5.)), b=arm('B', run(0, 4., tokens_gain=None))),
             cell(1600, a=arm('A', run(0, 3.)))]
    fig = drawn(plot_trend(cells))
    lines = [{l.get_label(): list(l.get_ydata()) for l in ax.lines if l.get_label() in 'AB'} for ax in fig.axes]
    assert lines[0]==dict(A=pytest.approx(np.exp([5, 4, 3])), B=pytest.approx(np.exp([4, 3])))
    assert list(lines[1])==['B'] and np.isnan(lines[1]['B'][0]) and lines[1]['B'][1]==2
    assert 'B: at 100 perplexity 54.6, never in tokens, 0.50× in FLOPs; at 400' in fig.alt
    drawn(plot_trend(cells[:1], 'size', ['b']))                                     # one point; no reference
    with pytest.raises(ValueError, match='none of the 0 cells'): plot_trend([])

def test_spaces_with_one_order_and_one_seed():
    fig = drawn(plot_spaces({'coarse': dict(importance=[run(0, 4.)]), 'fine': dict(importance=[], identity=[run(0, 5.)])}))
    assert fig.alt==('Search spaces, validation loss: coarse, importance: 8.000 before and 4.000 after (1 seed); '
                     'fine, identity: 8.000 before and 5.000 after (1 seed).')
    with pytest.raises(ValueError, match='`spaces` has no run'): plot_spaces(dict(coarse=dict(importance=[])))

def test_differences_are_paired_by_seed():
    base = arm('A', run(1, 5.), run(2, 7.), run(3, None))
    other = arm('B', run(2, 6., cost=dict(student=3e10)), run(1, 5.5), run(3, 4.), run(9, 1.))
    fig = drawn(plot_differences(cell(a=base, b=other, c=arm('C')), 'a'))
    assert fig.alt=='Final loss minus that of A: B -0.250 (-1.000 to +0.500; better in 1 of 2 seeds; 2.00× the FLOPs).'
    assert texts(fig.axes[0])==['2.00× the FLOPs']

def test_texts_are_relative_and_may_be_missing():
    base, other = arm('A', run(1, 5., test=dict(bible=6., test=5.)), run(2, 5., test=None)), arm('B', run(1, 4., test=dict(bible=5.)), run(2, 4.))
    c = cell(a=base, b=other) | dict(teacher=dict(test=dict(bible=5.5)))
    fig = drawn(plot_texts(c, 'a'))
    assert [ax.get_title(loc='left') for ax in fig.axes]==['bible'] and texts(fig.axes[0])==['0.368'] and fig.alt.endswith(': bible, B 0.368.')
    with pytest.raises(ValueError, match="no arm has a seed in common with 'b'"): plot_texts(cell(a=arm('A', run(1, 4., test=None)), b=other), 'b')

def test_sweeps_name_rates_at_the_edge():
    sweep = [[4e-3, 5.], [1e-3, 6.], [2e-3, 5.5], [8e-3, float('nan')]]            # one diverged
    fig = drawn(plot_sweeps([arm('A', sweep=sweep, lr=4e-3), arm('B', sweep=sweep, lr=2e-3), arm('C')]))
    assert fig.alt=='Learning rates chosen: A 0.004; B 0.002. At the edge of the sweep: A.'
    assert [list(l.get_ydata()) for l in fig.axes[0].lines][0]==[1, .5, 0]
    assert sum(ax.get_visible() for ax in drawn(plot_sweeps([arm(str(i), sweep=sweep) for i in range(5)])).axes)==5

def test_rank_correlation_with_ties_and_how_often_its_interval_covers():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, (2, 40))                                              # many ties
    ranks = lambda v: [(v < a).sum() + ((v == a).sum() + 1) / 2 for a in v]
    rho, low, high = rank_correlation(x, y)
    assert rho==pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1]) and low < rho < high
    covered = [low < 0 < high for a, b in rng.normal(size=(50, 2, 30)) for _, low, high in [rank_correlation(a, b, draws=100)]]
    assert 40 <= sum(covered) <= 50                                                 # of independent numbers; 47 or 48 expected
    with pytest.raises(ValueError, match='`x` has 3 values and `y` 4'): rank_correlation([1, 2, 3], [1, 2, 3, 4])

def test_titles_of_a_study_are_only_text():
    c = cell(a=arm(HOSTILE, run(1, 5.)), b=arm(HOSTILE + '2', run(1, 4.), sweep=[[1e-3, 4.]]))
    for fig in plot_arms(c), plot_trend([c]), plot_differences(c, 'a'), plot_texts(c, 'a'), plot_sweeps(list(c['arms'].values())): drawn(fig)
    drawn(plot_spaces({HOSTILE: {HOSTILE: [run(1, 4.)]}}))
    drawn(plot_curves(list(c['arms'].values()), x='both'))
