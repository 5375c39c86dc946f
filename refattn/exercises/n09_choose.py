"""Exercises of notebook 9, choosing; and the texts that it measures on."""

import functools

import numpy as np

import refattn
from refattn import masks
from refattn.encoder import load_encoder
from refattn.exercises.base import Design, Function, Refused
from refattn.exercises.mark import Mark

# Written for this course: each a little longer than the encoder's 512 tokens.
TEXTS = {
    "tides": """
The sea comes up the beach and goes back again twice in a day and a little more. People who live
by the shore have always known that the tides keep time with the moon, but it was Newton who said
why. The moon pulls on the whole earth, and it pulls more strongly on the water that is near to it
than on the ground below, and least of all on the water at the far side. So the ocean is drawn out
into two low hills, one under the moon and one opposite, and as the earth turns each coast is
carried through both of them. The sun does the same with about half the force. When sun and moon
stand in one line, at new moon and at full moon, their hills add up and we have spring tides, with
high water very high and low water very low. A week later they stand at right angles, each fills
the other's valleys, and the neap tides are small. All this would be simple if the ocean covered
everything. But the water must run around continents, through straits and over shallow shelves,
and it has no time to settle before the moon has moved on. Every bay has a period of its own in
which its water likes to swing, as a bath does when it is pushed. Where that period comes near to
half a lunar day the tide grows huge: in the Bay of Fundy the level changes by more than twelve
metres, while in the Mediterranean a visitor may never see that there is a tide at all. For a
harbour master the theory is therefore only a beginning. He needs to know at what hour a ship of a
given depth can cross the bar, and that is found by measuring. A float in a well moves a pen over
a paper drum for a year or longer. The curve is then taken apart into a sum of waves whose periods
are known from astronomy, and from the sizes and delays of these waves the heights for the coming
years are worked out. Long before there were electronic computers this was done by a machine of
brass wheels and a long wire, in which each wheel stood for one motion of the moon or of the sun,
and the wire added them up. The tables of such machines were secret in time of war, for a landing
on an open beach depends on the hour of low water. Today the same sums are done in a moment, and
satellites measure the level of the open sea from above to within a few centimetres. The fishermen
look at the tables too, and then at the sky, because a falling barometer and a wind from the sea
can add a metre that no table knows of.
""",
    "bees": """
A colony of honey bees in summer holds one queen, some hundreds of drones and perhaps forty
thousand workers, all of them her daughters. The queen does not rule. She lays eggs, up to two
thousand in a day, and by a scent that is passed from mouth to mouth she lets the others know that
she is alive. A worker lives for about six weeks, and her duties change with her age. In her first
days she cleans cells. Then glands in her head begin to give milk, and she feeds the larvae. Later
other glands give wax, and she builds comb, hanging in a chain with her sisters. After that she
takes nectar from bees that come home, fans it until it thickens into honey, guards the door, and
only in her last weeks does she fly out to the flowers. If a disaster takes all the nurses, older
bees can go back to nursing, so this order is a habit and not a law. The best known thing about
bees is their dance. A forager who has found a rich field of clover runs in a short straight line
on the dark comb, shaking her body, then circles back and runs again. The angle between her run
and the vertical is the angle between the field and the sun, and the length of the run tells the
distance. Those who follow her feel the dance rather than see it, and many of them find the place,
helped by the smell of clover on her hairs. When a hive becomes too full, the old queen leaves
with half of the workers and settles as a swarm on a branch. Scouts search the woods for hollow
trees, and dance for what they find. A scout with a fine hole dances longer, more of her sisters
go to look at it, and support for poor holes dies away, until a quorum stands at one of them and
the swarm takes off. Nobody compares all the sites, and still the swarm mostly chooses the best
one. In winter the bees do not sleep. They hang in a ball around their stores, shivering to keep
warm, and slowly eat their way upward through the honey. A keeper who takes too much in August
will find an empty hive in March. Mites, pesticides and fields without weeds have made their life
harder, and most colonies would not last three years without a keeper's help. Wild bees, of which
there are thousands of kinds, most of them living alone in the ground or in hollow stems, have no
keeper at all, though they do a large part of the work in orchards and meadows, and they need
little more than bare soil and flowers.
""",
    "bridges": """
A bridge has to carry its own weight, the weight of what crosses it, and the wind. The oldest
answer is a beam laid from bank to bank. When it is loaded it bends, the upper side is pressed
together and the under side is stretched, and since stone cracks when it is stretched, a stone
beam can only be short. The Roman builders knew a way around this. In an arch every stone is
wedged between its neighbours and is only pressed, so mortar is hardly needed, and many of their
arches stand today. The price is the thrust: an arch pushes outward at its feet, and the banks or
the piers must hold it. Iron, and after it steel, can be stretched as well as pressed, and that
opened new forms. A truss is a beam from which everything idle has been cut away. Its bars form
triangles, because a triangle of bars cannot change its shape without changing the length of a
bar, and each bar has only to pull or to push along its own line. For the longest spans the deck
hangs from cables of steel wire that run over two towers and down to anchors in the rock. A cable
cannot be bent or pressed, it can only pull, and it takes by itself the curve that its load asks
for. Such bridges are light, and what is light can be moved by the wind. In 1940 a new suspension
bridge in the state of Washington began to twist in a steady breeze, further with every swing,
until the deck broke up and fell into the water four months after it was opened. The wind was not
strong. It fed the swinging in time with it, and the slender deck had nothing to resist with.
Since then every long bridge is tried as a model in a wind tunnel, and decks are made as stiff
boxes shaped like a wing, or as open trusses that let the wind pass through. Engineers must think
as well about what cannot be seen when the ribbon is cut. Steel grows in the heat, so the ends
stand on rollers and the road has joints like combs. Rivers dig away the ground around the piers
during floods. A crack too small to find grows a little with each lorry, and after thirty years it
may be long enough to break a bar. A good bridge is therefore one that can be inspected and
mended, and that gives warning before it fails. The inspectors hang under the deck in a small
basket, knock on the bolts with a hammer and listen, and note each patch of rust in a book that is
passed on from one generation to the next.
""",
}

LAYERS, N, D = 6, 512, 32
BUDGET = 1 / 16  # of exercise 4, as a share of softmax attention's FLOPs
NAMES = ("softmax", "window", "window and first token", "strided", "blocks", "linear")


@functools.cache
def _encoder():
    """The trained encoder, the ids of the texts, and their exact embeddings."""
    try:
        encoder = load_encoder()
    except ImportError as error:
        raise Refused(f"This exercise runs the trained encoder. {error}") from error
    heads = refattn.datasets.load_heads()
    ids = {"Alice": np.array([encoder.tokenizer.token_to_id(t) for t in heads.tokens])}
    ids |= {name: encoder.tokenize(TEXTS[name]) for name in ("tides", "bees")}
    return encoder, ids, {name: encoder.embed(x) for name, x in ids.items()}


class OnEncoder(Function):
    """A function that is judged on the encoder; where that is missing, the mark says so."""

    def check(self, answer):
        try:
            _encoder()
        except Refused as error:
            given = [self._given(answer, case) for case in self.cases]
            hole = all(x is None or x is ... for x in given)
            words = self.hint if hole else str(error)
            return Mark(self.title, self.points, words=(words,), filled=not hole)
        return super().check(answer)


def _similarity(name, attentions):
    encoder, ids, exact = _encoder()
    return float(exact[name] @ encoder.embed(ids[name], attention=attentions))


def _window_16(q, k, v):
    return refattn.local_attention(q, k, v, window=16)


def _swap(layers):
    """1 - similarity on Alice with a window of 16 each side in these layers alone."""
    chosen = [_window_16 if i in layers else refattn.softmax_attention for i in range(LAYERS)]
    return 1 - _similarity("Alice", chosen)


@functools.cache
def _layer_loss(layer):
    return _swap({layer})


@functools.cache
def _others_loss(layer):
    return _swap(set(range(LAYERS)) - {layer})


@functools.cache
def _next_loss(layer):
    return _swap({(layer - 1) % LAYERS})


def _similar(layer):
    return 1 - _layer_loss(layer)


def _all_layers(layer):
    return _swap(set(range(LAYERS)))


def _with_mask(mask):
    def attention(q, k, v):
        return refattn.sparse_attention(q, k, v, mask=mask)

    return attention, refattn.sparse_attention_cost(N, N, D, D, nnz=mask.nnz)


def _with(name, **options):
    def attention(q, k, v):
        return getattr(refattn, name)(q, k, v, **options)

    return attention, getattr(refattn, f"{name}_cost")(N, N, D, D, **options)


@functools.cache
def _made(name, size):
    """The attention of that name and size, and its cost on 512 tokens of 32 columns."""
    if name == "window":
        return _with("local_attention", window=size)
    if name == "window and first token":
        return _with_mask(masks.longformer(N, size, [0]))
    if name == "strided":
        return _with_mask(masks.strided(N, size))
    if name == "blocks":
        return _with("block_attention", block=size)
    if name == "linear":
        return _with("linear_attention", feature_map=size)
    return _with("softmax_attention")


def _checked(choice):
    if not isinstance(choice, (list, tuple)) or len(choice) != LAYERS:
        raise Refused("Give a list of six pairs (name, size), one for each layer.")
    for one in choice:
        if not isinstance(one, (list, tuple)) or len(one) != 2 or one[0] not in NAMES:
            raise Refused(f"Each layer is a pair (name, size) with a name of {', '.join(NAMES)}.")
        name, size = one
        if name == "linear" and size not in ("elu", "relu", "softmax"):
            raise Refused('The size of "linear" is its map: "elu", "relu" or "softmax".')
        whole = isinstance(size, (int, np.integer)) and size >= 1
        if name not in ("linear", "softmax") and not whole:
            raise Refused("A size is a whole number, at least 1.")
    return [_made(name, size) for name, size in choice]


def share(choice):
    """FLOPs of six layers as a share of softmax attention's."""
    full = refattn.softmax_attention_cost(N, N, D, D).flops
    return sum(cost.flops for _, cost in _checked(choice)) / LAYERS / full


def similarity(choice):
    """Mean cosine similarity to the exact embedding, over two texts."""
    attentions = [attention for attention, _ in _checked(choice)]
    return float(np.mean([_similarity(name, attentions) for name in ("tides", "bees")]))


def _score(choice):
    if (spent := share(choice)) > BUDGET:
        raise Refused(f"Over budget: {spent:.4f} of softmax attention's FLOPs, {BUDGET} allowed.")
    return similarity(choice)


@functools.cache
def _plain():
    return similarity([(KEPT, 8)] * LAYERS)


@functools.cache
def _best():
    return similarity(BEST)


KEPT = "window and first token"
BEST = [("window", 8), (KEPT, 8), (KEPT, 8), (KEPT, 16), (KEPT, 32), ("window", 16)]


def _only_linear(choice):
    return "linear" in dict(choice)


def _never_first(choice):
    return not {KEPT, "softmax"} & set(dict(choice))


def _all_alike(choice):
    return len(set(map(tuple, choice))) == 1


def _crossover(d, r):
    ready = refattn.FeatureMap(query=np.asarray, key=np.asarray)
    one, two = (
        refattn.linear_attention_cost(n, n, d, d, feature_map=ready, r=r).flops for n in (1, 2)
    )
    return (two - one) / refattn.softmax_attention_cost(1, 1, d, d).flops


def _one_pass(d, r):
    return (2 * r * d + 3 * r + d) / (4 * d + 6)


def _products_only(d, r):
    return float(r)


def _no_denominator(d, r):
    return (4 * r * d) / (4 * d + 6)


def _roofline(flops, moved, peak, bandwidth):
    return max(flops / peak, moved / bandwidth), float(flops / moved >= peak / bandwidth)


def _added(flops, moved, peak, bandwidth):
    return flops / peak + moved / bandwidth, float(flops / moved >= peak / bandwidth)


def _fastest(flops, moved, peak, bandwidth):
    return min(flops / peak, moved / bandwidth), float(flops / moved >= peak / bandwidth)


def _reversed(flops, moved, peak, bandwidth):
    return max(flops / peak, moved / bandwidth), float(flops / moved < peak / bandwidth)


EXERCISES = {
    1: Function(
        "crossover",
        points=2,
        truth=_crossover,
        cases=[(32, 32), (64, 64), (64, 256), (64, 4096)],
        tolerance=1e-9,
        hint="Set N^2 (4 d + 6) equal to N times what a token costs; count S, z, and the division.",
        mistakes={
            "That is r alone: the products cancel, but softmax pays 6 more for each pair, and the "
            "linear form pays for its denominator.": _products_only,
            "The denominator is missing: z takes r additions a key, q . z takes 2 r a query, and "
            "the division d.": _no_denominator,
            "There are two products, S = sum phi(k) v^T and phi(q)^T S: each takes 2 r d a "
            "token.": _one_pass,
        },
    ),
    2: Function(
        "roofline",
        points=2,
        truth=_roofline,
        parts=("seconds", "by_arithmetic"),
        cases=[(1e9, 1e6, 1e11, 1e10), (1e6, 1e6, 1e11, 1e10), (2e9, 4e8, 5e10, 2e10)],
        tolerance=lambda wanted: 1e-9 * float(wanted),
        hint="How long for the FLOPs alone, how long for the bytes alone? The slower one rules.",
        mistakes={
            "Arithmetic and traffic run at the same time: the slower of the two rules, they do not "
            "add up.": _added,
            "The faster of the two has to wait for the slower one: take the maximum.": _fastest,
            "The time is right, the side is not: many FLOPs for each byte mean that arithmetic is "
            "the limit.": _reversed,
        },
    ),
    3: OnEncoder(
        "loss_of_layer",
        points=3,
        truth=_layer_loss,
        cases=[(0,), (2,), (4,)],
        tolerance=1e-3,
        hint="encoder.embed takes a list of six attentions; all but one are the exact one.",
        mistakes={
            "This is the similarity; the loss is what is missing to 1.": _similar,
            "This layer is the exact one and all others are swapped: it is the other way "
            "round.": _others_loss,
            "All six layers are swapped: leave the others exact.": _all_layers,
            "Layers are counted from 0, as in encoder.layer.0.": _next_loss,
        },
    ),
    4: Design(
        "six layers",
        points=3,
        hint="Which layers lose least with a plain window, which need the first token? Look at "
        "figure 09_layers, spend where a FLOP buys most.",
        score=_score,
        plain=_plain,
        best=_best,
        unit="mean similarity",
        notes={
            "A linear map forgets which keys the query likes: this model was not trained for "
            "it.": _only_linear,
            "No layer keeps the first token, which many heads lean on: it costs two rows of "
            "pairs.": _never_first,
            "All layers have the same: move FLOPs from a layer that loses little to one that loses "
            "much.": _all_alike,
        },
    ),
}
