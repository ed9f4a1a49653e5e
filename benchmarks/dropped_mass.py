"""What it would save to leave tiles of little probability out of the linear losses' second product.

    python benchmarks/dropped_mass.py [--shape 1024x4096 ...] [--cap 1e-4 ...] [--tokens N] [--vocab V]

The gradient of the hidden states is made of O = P W, where P (N, V) is exp(y - rest), the distribution of all
words but target and runner-up. A tile (rows x columns) of P may be left out where its share of P, in the mean
of its rows, is at most a cap: the caps then bound what is lost. The share can only be of what a row has had
so far, since its later columns are not known when the tile is at hand.

A shape is that of a tile: 1024x4096 and 1024x8192 are what the operator holds of float32 and bfloat16 logits;
the small one is what a kernel has that makes logits in registers. Logits are those of the embedded model on
answers that it has memorised, and simulated ones for a vocabulary of usual size: a Zipf distribution of words
and, on top of it, a Gaussian of 3 nats for each token. ``sorted``: by mean probability, rare words together,
which is the best that can be done for this. ``dropped``: the share of the product's tiles that is left out.
``gradient error``: that of the IHL's gradient of the hidden states, relative, in the Frobenius norm.

It does not pay (results/dropped_mass_cpu.json). No tile of the operator's size is under a cap of 1e-3. Of the
simulated ones a seventh is under 1e-2: a fourteenth of what both products take, for an error of 1e-3, if the
vocabulary is sorted, for which it takes a copy of W. (The embedded model's vocabulary is one tile.) Small
tiles can be left out sooner, but not where the products are a library's. The operator has no such option.
"""

from functools import partial

import torch
from harness import Benchmark, arguments, interleaved_times, sizes

from loku_kernels import blocks, inverted_hinge, softmax_triplet

SHAPES = ["1024x4096", "1024x8192", "128x256"]
CAPS = [1e-4, 1e-3, 1e-2]
SOURCES = ["embedded", "embedded, sorted", "simulated, sorted"]
TOKENS, VOCAB = 2048, 50257
IGNORE = -100


def embedded(tokens):
    """hidden (N, D), weight (V, D), labels (N,) of the embedded model on its answers."""
    from loku.data import tokenize_dataset
    from loku.demo import load_model, load_rows

    model, tokenizer = load_model()
    hidden, labels = [], []
    for row in tokenize_dataset([row for rows in load_rows() for row in rows], tokenizer):
        target = torch.tensor(row["labels"][1:])
        states = model.model(torch.tensor([row["input_ids"][:-1]])).last_hidden_state[0]
        hidden.append(states[target != IGNORE])
        labels.append(target[target != IGNORE])
        if sum(map(len, labels)) >= tokens:
            break
    return torch.cat(hidden)[:tokens], model.lm_head.weight.detach(), torch.cat(labels)[:tokens]


def operands(source, tokens, vocab):
    """logits (N, V), weight (V, D), labels (N,)."""
    torch.manual_seed(0)
    if source.startswith("embedded"):
        hidden, weight, labels = embedded(tokens)
        logits = hidden @ weight.t()
    else:
        logits = 3 * torch.randn(tokens, vocab) - torch.arange(1, vocab + 1).log()
        weight, labels = torch.randn(vocab, 256), logits.softmax(1).multinomial(1)[:, 0]
    if source.endswith("sorted"):
        order = logits.softmax(1).mean(0).argsort(descending=True)
        logits, weight, labels = logits[:, order], weight[order], order.argsort()[labels]
    return logits.contiguous(), weight.contiguous(), labels


def distribution_of_the_rest(logits, labels):
    """P (N, V), and the gradient of the sum of the tokens' IHL in their triplets (N, 3)."""
    triplet, runner_up_id = softmax_triplet(logits, labels)
    unit = torch.zeros_like(triplet)
    unit[:, 2] = 1.0
    rest = blocks.triplet_backward(unit, logits, labels, IGNORE, triplet, runner_up_id)
    with torch.enable_grad():
        loss = inverted_hinge(triplet.requires_grad_()).sum()
    return rest, torch.autograd.grad(loss, triplet)[0].float(), runner_up_id


def kept_tiles(rest, rows, columns, cap):
    """(row slice, column slice) of the tiles that are not left out, and how many tiles there are."""
    mass = torch.stack([part.sum(1) for part in rest.split(columns, 1)], 1)
    so_far = mass.cumsum(1)
    share = torch.where(so_far > 0, mass / so_far, 0.0)
    share = torch.stack([part.mean(0) for part in share.split(rows)])
    kept = [
        (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
        for i, j in (share > cap).nonzero().tolist()
    ]
    return kept, share.numel()


def product_of(tiles, rest, weight, out):
    out.zero_()
    for rows, columns in tiles:
        out[rows].addmm_(rest[rows, columns], weight[columns])
    return out


@torch.no_grad()
def products(source, shape, caps, tokens, vocab, device="cpu"):
    """name -> function, and name -> columns of its row: O whole, of all tiles, and of those over each cap."""
    logits, weight, labels = (x.to(device) for x in operands(source, tokens, vocab))
    rest, grad, runner_up_id = distribution_of_the_rest(logits, labels)
    out, exact = torch.empty(len(rest), weight.shape[1], device=device), rest @ weight
    gradient = grad[:, :1] * weight[labels] + grad[:, 1:2] * weight[runner_up_id] + grad[:, 2:] * exact
    functions = {"one product": lambda: torch.mm(rest, weight, out=out)}
    found = {"one product": {"dropped": 0.0, "gradient_error": 0.0}}
    for name, cap in [("all tiles", -1.0), *((f"cap {cap:g}", cap) for cap in caps)]:
        tiles, count = kept_tiles(rest, *sizes(shape), cap)
        functions[name] = partial(product_of, tiles, rest, weight, out)
        error = grad[:, 2:] * (functions[name]() - exact)
        relative = (error.norm() / gradient.norm()).item()
        found[name] = {"dropped": 1 - len(tiles) / count, "gradient_error": relative}
    return functions, found


def measure(bench, threads, source, shape):
    torch.set_num_threads(threads)
    options = bench.options
    functions, found = products(source, shape, options.cap, options.tokens, options.vocab, bench.device)
    times = interleaved_times(functions, bench.device, bench.runs)
    bench.add(
        {
            "what": f"{source}, tiles of {shape}",
            "dtype": "float32",
            "threads": threads,
            "name": name,
            "milliseconds": seconds * 1e3,
            **found[name],
            "over": {"one product": times["one product"] / seconds},
        }
        for name, seconds in times.items()
    )


def main(argv=None):
    parser = arguments(__doc__, SHAPES, ["float32"], shape_help="rows x columns of a tile")
    parser.add_argument("--cap", type=float, nargs="+", default=CAPS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--vocab", type=int, default=VOCAB, help="of the simulated logits")
    bench = Benchmark("dropped_mass", parser, argv)
    for case in bench.cases(bench.options.threads, SOURCES, bench.options.shape):
        measure(bench, *case)
    bench.close()


if __name__ == "__main__":
    main()
