"""Lab 3.2: mistakes that students make, and right answers that look otherwise. See `tools.exercises.trials`."""

FAULTS = {
    "magnitude": {
        "sign not dropped": [(".abs()", "")],
        "the largest go": [("argsort()", "argsort(descending=True)")],
        "row by row": """
def magnitude_mask(weight, sparsity):
    removed = weight.abs().argsort(dim=1)[:, : round(sparsity * weight.shape[1])]
    return torch.ones_like(weight, dtype=torch.bool).scatter_(1, removed, False)
""",
        "by a threshold": """
def magnitude_mask(weight, sparsity):
    return weight.abs() > weight.abs().flatten().quantile(sparsity)
""",
        "keeps as many as should go": [("round(sparsity", "weight.numel() - round(sparsity")],
        "True for what goes": [("torch.ones(", "torch.zeros("), ("= False", "= True")],
        "one too many": [("round(sparsity * weight.numel())", "round(sparsity * weight.numel()) + 1")],
    },
    "wanda": {
        "mean of |x|": [("inputs.norm(dim=0)", "inputs.abs().mean(0) ** 0.2")],
        "mean of x": [("inputs.norm(dim=0)", "inputs.mean(0).abs()")],
        "whole matrix": """
def wanda_mask(weight, inputs, sparsity):
    scores = (weight.abs() * inputs.norm(dim=0)).flatten()
    mask = torch.ones_like(scores, dtype=torch.bool)
    mask[scores.argsort()[: round(sparsity * len(scores))]] = False
    return mask.view_as(weight)
""",
        "magnitude": [(" * inputs.norm(dim=0)", "")],
        "activations alone": [("weight.abs() * inputs.norm(dim=0)", "inputs.norm(dim=0).expand_as(weight)")],
        "squared norms": [("inputs.norm(dim=0)", "inputs.square().sum(0)")],
        "the best go": [("argsort(dim=1)", "argsort(dim=1, descending=True)")],
        "columns compared": [("argsort(dim=1)", "argsort(dim=0)")],
    },
    "nm": {
        "removes n": [
            ("dtype=torch.bool).scatter_(-1, kept, True)", "dtype=torch.bool).scatter_(-1, kept, True).logical_not()")
        ],
        "the lowest": [("topk(n, dim=-1)", "topk(n, dim=-1, largest=False)")],
        "along the outputs": [
            ("scores.reshape(len(scores), -1, m)", "scores.T.reshape(scores.shape[1], -1, m)"),
            (".reshape(scores.shape)", ".reshape(scores.T.shape).T"),
        ],
        "m - n": [("topk(n,", "topk(m - n,")],
        "whole rows": [
            ("reshape(len(scores), -1, m)", "reshape(len(scores), 1, -1)"),
            ("topk(n,", "topk(n * scores.shape[1] // m,"),
        ],
        "strided groups": [("scores.reshape(len(scores), -1, m)", "scores.reshape(len(scores), m, -1).mT")],
        "the first n": [("groups.topk(n, dim=-1).indices", "torch.arange(n).expand(*groups.shape[:2], n)")],
    },
    "sparsegpt": {
        "no compensation": [("work[:, i + 1 :] -= ", "work[:, i + 1 :] -= 0 * ")],
        "wrong sign": [("work[:, i + 1 :] -= ", "work[:, i + 1 :] += ")],
        "H in place of its inverse": [("torch.linalg.inv(damped)", "damped")],
        "inverse never reduced": [
            ("torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)", "torch.linalg.inv(damped)")
        ],
        "error of the first weights": [("error = (work[:, i] - kept)", "error = (weight[:, i] * ~mask[:, i])")],
        "zeros refilled": [("        work[:, i] = kept\n", "")],
        "all zeroed first": [("work = weight.clone()", "work = weight * mask")],
        "no damping": [("damp * hessian", "0 * hessian")],
        "masked again only": [("return work", "return weight * mask + 0 * work")],
    },
    "bitmask": {
        "highest bit first": [("torch.arange(8)", "torch.arange(7, -1, -1)")],
        "one byte each": [("(bits.reshape(-1, 8) * places).sum(1).to(torch.uint8)", "bits")],
        "not padded": [
            ("math.ceil(len(flat) / 8)", "(len(flat) // 8)"),
            ("bits[: len(flat)] = kept", "bits[:] = kept[: len(bits)]"),
        ],
        "columns first": [("weight.flatten()", "weight.T.flatten()")],
        "values with zeros": [(", flat[kept]", ", flat")],
        "dtype lost": [(", dtype=values.dtype", "")],
        "padding kept": [("math.prod(shape)", "8 * len(bitmask)")],
        "sign for zero": [("flat != 0", "flat > 0")],
    },
    "owl": {
        "more outliers, more pruned": [("density.mean() - density", "density - density.mean()")],
        "half the interval": [("* 2 * span", "* span")],
        "mean missed": [(" + density.mean()", "")],
        "mean of all blocks": [("multiple * s.mean()", "multiple * torch.cat(scores).mean()")],
        "absolute threshold": [("multiple * s.mean()", "multiple")],
        "no guard": [(".clamp(min=1e-12)", "")],
        "densities returned": [("(sparsity + density.mean() - density)", "(1 - sparsity - density.mean() + density)")],
    },
    "sensitivity": {
        "one after the other": [
            (
                "        changed = ",
                "        weights = [*weights[:i], pruned(weight, sparsity), *weights[i + 1 :]]\n        changed = ",
            ),
        ],
        "all but one": [
            (
                "[*weights[:i], pruned(weight, sparsity), *weights[i + 1 :]]",
                "[w if j == i else pruned(w, sparsity) for j, w in enumerate(weights)]",
            )
        ],
        "not relative": [(" / dense.square().sum()", "")],
        "not squared": [(".square().sum()", ".norm()")],
        "at the block's own output": [
            (
                "forward([*weights[:i], pruned(weight, sparsity), *weights[i + 1 :]], inputs)",
                "dense - inputs @ (weight - pruned(weight, sparsity)).T",
            )
        ],
        "numbering off by one": [("pruned(weight, sparsity)", "pruned(weights[i - 1], sparsity)")],
        "density for sparsity": [("pruned(weight, sparsity)", "pruned(weight, 1 - sparsity)")],
    },
    "structured": {
        "cost without H": [(" / inverse.diagonal()", "")],
        "smallest [H⁻¹]jj": [("weight.square().sum(0) / inverse.diagonal()", "1 / inverse.diagonal()")],
        "dearest": [("argmin", "argmax")],
        "no compensation": [("torch.outer(", "0 * torch.outer(")],
        "sign": [("weight - torch.outer", "weight + torch.outer")],
        "no divisor": [("weight[:, j] / inverse[j, j]", "weight[:, j]")],
        "multiplied by [H⁻¹]jj": [("sum(0) / inverse", "sum(0) * inverse")],
        "column left in": [("torch.cat((updated[:, :j], updated[:, j + 1 :]), 1)", "updated")],
    },
    "metadata": {
        "high bits first": [("places[..., 0] | places[..., 1] << 2", "places[..., 0] << 2 | places[..., 1]")],
        "groups swapped": [("nibbles[..., 0] | nibbles[..., 1] << 4", "nibbles[..., 0] << 4 | nibbles[..., 1]")],
        "absolute columns": [
            ("(nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8)", "places.reshape(rows, -1).to(torch.uint8)")
        ],
        "values of the group's start": [("groups.gather(-1, places)", "groups[..., :2]")],
        "mask too narrow": [("& 3", "& 1")],
        "shifts by one": [("[0, 2, 4, 6]", "[0, 1, 2, 3]")],
        "dtype lost": [("4, dtype=values.dtype", "4")],
        "int32": [(".to(torch.uint8)", ".to(torch.int32)")],
    },
    "plan": {
        "uniform": "def plan(weights, inputs, sparsity):\n    return [sparsity] * len(weights)\n",
        "too little removed": "def plan(weights, inputs, sparsity):\n    return [0.5] * len(weights)\n",
        "last blocks first": """
def plan(weights, inputs, sparsity):
    n = len(weights)
    return [sparsity - 0.1 + 0.2 * i / (n - 1) for i in range(n)]
""",
        "the sensitive ones more": [("min(tries, key=error)", "max(tries, key=error)")],
        "one block alone": "def plan(weights, inputs, sparsity):\n    return [1.0] * 4 + [sparsity * 5 - 4]\n",
        "beyond one": "def plan(weights, inputs, sparsity):\n    return [3.5, 0.0, 0.0, 0.0, 0.0]\n",
        "not a list": [("return [t / steps for t in taken]", "return torch.tensor(taken) / steps")],
    },
    "clinic": {
        "one silent channel is enough": [('not patient["norms"].any()', 'not patient["norms"].all()')],
        "every pruned weight is ill": [('patient["weight"][~patient["mask"]].any()', "True")],
        "by the share of zeros": [
            ('patient["weight"][~patient["mask"]].any()', '(patient["weight"] == 0).float().mean() < 0.45')
        ],
        "pattern by the count": [("(groups.sum(-1) == 2).all()", 'patient["mask"].float().mean() == 0.5')],
        "pattern mended along outputs": [
            ('nm_mask(patient["scores"], 2, 4)', 'nm_mask(patient["scores"].T.contiguous(), 2, 4).T')
        ],
        "mask turned over": [("scatter_(1, best, True)", "scatter_(1, best, True).logical_not()")],
        "half, whatever it was": [('patient["mask"].sum(1)[0].item()', 'patient["mask"].shape[1] // 2')],
        "weights left as they are": [('patient["weight"] * patient["mask"]', 'patient["weight"]')],
    },
}

NOTHING = {  # answers that do nothing, or not what was asked for
    "magnitude": {
        "the first": """
def magnitude_mask(weight, sparsity):
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[: round(sparsity * weight.numel())] = False
    return mask.view_as(weight)
"""
    },
    "wanda": {
        "magnitude": [(" * inputs.norm(dim=0)", "")],
    },
    "nm": {"the first n": [("groups.topk(n, dim=-1).indices", "torch.arange(n).expand(*groups.shape[:2], n)")]},
    "sparsegpt": {
        "the mask alone": """
def sparsegpt(weight, hessian, mask, damp=0.01):
    return weight * mask
""",
        "as it came": "def sparsegpt(weight, hessian, mask, damp=0.01):\n    return weight\n",
    },
    "bitmask": {
        "zeros of the right size": """
def pack(weight):
    return torch.zeros(math.ceil(weight.numel() / 8), dtype=torch.uint8), weight[weight != 0][:0].new_zeros(512)


def unpack(bitmask, values, shape):
    return torch.zeros(shape, dtype=values.dtype)
"""
    },
    "owl": {"uniform": "def owl(scores, sparsity, multiple, span):\n    return [sparsity] * len(scores)\n"},
    "sensitivity": {
        "the sparsity": "def sensitivity(weights, inputs, sparsity):\n    return [sparsity] * len(weights)\n"
    },
    "structured": {"the first": "def remove_input(weight, inverse):\n    return 0, weight[:, 1:]\n"},
    "metadata": {
        "zeros of the right size": """
def compress(weight):
    rows, columns = weight.shape
    values = torch.zeros(rows, columns // 2, dtype=weight.dtype)
    return values, torch.zeros(rows, columns // 8, dtype=torch.uint8)


def decompress(values, metadata):
    return torch.zeros(len(values), 2 * values.shape[1], dtype=values.dtype)
"""
    },
    "plan": {"uniform": "def plan(weights, inputs, sparsity):\n    return [sparsity] * len(weights)\n"},
    "clinic": {
        "everybody is healthy": """
def diagnose(patient):
    return "healthy"


def mend(patient):
    return patient["weight"] if patient["kind"] == "pruned" else patient["mask"]
"""
    },
}

VARIANTS = {
    "magnitude": {
        "float64": [("weight.abs()", "weight.double().abs()")],
        "topk": """
def magnitude_mask(weight, sparsity):
    mask = torch.ones_like(weight, dtype=torch.bool)
    gone = weight.abs().reshape(-1).topk(round(sparsity * weight.numel()), largest=False).indices
    mask.view(-1)[gone] = False
    return mask
""",
        "with numpy": """
def magnitude_mask(weight, sparsity):
    import numpy as np
    flat = np.abs(weight.numpy()).ravel()
    keep = np.ones(flat.size, dtype=bool)
    keep[np.argsort(flat)[: int(round(sparsity * flat.size))]] = False
    return torch.from_numpy(keep.reshape(weight.shape))
""",
    },
    "wanda": {
        "float64": [("inputs.norm(dim=0)", "inputs.double().square().sum(0).sqrt()")],
        "einsum": [("inputs.norm(dim=0)", 'torch.einsum("ti,ti->i", inputs, inputs).sqrt()')],
        "row by row": """
def wanda_mask(weight, inputs, sparsity):
    norms, mask = inputs.pow(2).sum(0).sqrt(), torch.ones(weight.shape, dtype=torch.bool)
    for row, keep in zip(weight, mask):
        keep[(row.abs() * norms).argsort()[: round(sparsity * len(row))]] = False
    return mask
""",
        "squared scores": [("weight.abs() * inputs.norm(dim=0)", "weight**2 * inputs.pow(2).sum(0)")],
    },
    "nm": {
        "float64": [("scores.reshape", "scores.double().reshape")],
        "by rank": """
def nm_mask(scores, n, m):
    groups = scores.unflatten(1, (-1, m))
    rank = groups.argsort(dim=-1).argsort(dim=-1)
    return (rank >= m - n).flatten(1)
""",
        "group by group": """
def nm_mask(scores, n, m):
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for start in range(0, scores.shape[1], m):
        best = scores[:, start : start + m].sort(dim=1, descending=True).indices[:, :n] + start
        mask.scatter_(1, best, True)
    return mask
""",
    },
    "sparsegpt": {
        "float64": [
            ("weight.clone()", "weight.double()"),
            ("damped = hessian +", "hessian = hessian.double()\n    damped = hessian +"),
        ],
        "einsum": [("error[:, None] * factor[i, i + 1 :]", 'torch.einsum("o,i->oi", error, factor[i, i + 1 :])')],
        "elimination": """
def sparsegpt(weight, hessian, mask, damp=0.01):
    n, w = len(hessian), weight.clone().double()
    inverse = torch.linalg.inv(hessian.double() + damp * hessian.diagonal().mean() * torch.eye(n))
    for i in range(n):
        error = torch.where(mask[:, i], 0.0, w[:, i]) / inverse[i, i]
        w = w - torch.outer(error, torch.cat([torch.zeros(i), inverse[i, i:]]))
        w[:, i] *= mask[:, i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return w.float()
""",
        "row by row": """
def sparsegpt(weight, hessian, mask, damp=0.01):
    damped = hessian.clone()
    damped.diagonal().add_(damp * hessian.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    new = weight.clone()
    for w, keep in zip(new, mask):
        for i in range(len(w)):
            if not keep[i]:
                w[i:] -= w[i].clone() / u[i, i] * u[i, i:]
                w[i] = 0
    return new
""",
    },
    "bitmask": {
        "einsum": [
            ("(bits.reshape(-1, 8) * places).sum(1)", 'torch.einsum("ij,j->i", bits.reshape(-1, 8).long(), places)')
        ],
        "numpy": """
def pack(weight):
    import numpy as np
    flat = weight.flatten()
    return torch.from_numpy(np.packbits((flat != 0).numpy(), bitorder="little")), flat[flat != 0]


def unpack(bitmask, values, shape):
    import numpy as np
    kept = torch.from_numpy(np.unpackbits(bitmask.numpy(), count=math.prod(shape), bitorder="little")).bool()
    return torch.zeros(shape, dtype=values.dtype).masked_scatter(kept.view(shape), values)
""",
        "a loop": """
def pack(weight):
    numbers, bits, values = weight.flatten(), [0] * ((weight.numel() + 7) // 8), []
    for i, number in enumerate(numbers):
        if number != 0:
            bits[i // 8] |= 1 << (i % 8)
            values.append(number)
    return torch.tensor(bits, dtype=torch.uint8), torch.stack(values) if values else numbers[:0]


def unpack(bitmask, values, shape):
    flat, used = torch.zeros(math.prod(shape)).to(values.dtype), 0
    for i in range(len(flat)):
        if int(bitmask[i // 8]) >> (i % 8) & 1:
            flat[i] = values[used]
            used += 1
    return flat.view(shape)
""",
    },
    "owl": {
        "pure Python": """
def owl(scores, sparsity, multiple, span):
    ratios = [(s > multiple * s.mean()).sum().item() / s.numel() for s in scores]
    width = max(ratios) - min(ratios)
    if width == 0:
        return [sparsity] * len(scores)
    density = [2 * span * (r - min(ratios)) / width for r in ratios]
    return [sparsity - d + sum(density) / len(density) for d in density]
""",
        "float64 scores": [("s > multiple * s.mean()", "s.double() > multiple * s.double().mean()")],
        "centred first": """
def owl(scores, sparsity, multiple, span):
    r = torch.stack([(s / s.mean() > multiple).float().mean() for s in scores])
    return (sparsity - (r - r.mean()) * 2 * span / max((r.max() - r.min()).item(), 1e-9)).tolist()
""",
    },
    "sensitivity": {
        "copies": """
def sensitivity(weights, inputs, sparsity):
    y, out = forward(weights, inputs), []
    for i in range(len(weights)):
        other = [w.clone() for w in weights]
        other[i] = pruned(other[i], sparsity)
        out.append(float((forward(other, inputs) - y).pow(2).sum() / y.pow(2).sum()))
    return out
""",
        "float64": [("forward(weights, inputs)", "forward([w.double() for w in weights], inputs.double())")],
        "from the last": """
def sensitivity(weights, inputs, sparsity):
    y, out = forward(weights, inputs), {}
    for i in reversed(range(len(weights))):
        z = forward([pruned(w, sparsity) if i == j else w for j, w in enumerate(weights)], inputs)
        out[i] = ((z - y).norm() / y.norm()).item() ** 2
    return [out[i] for i in range(len(weights))]
""",
    },
    "structured": {
        "float64": [("cost =", "weight, inverse = weight.double(), inverse.double()\n    cost =")],
        "einsum": [("weight.square().sum(0)", 'torch.einsum("oi,oi->i", weight, weight)')],
        "by solving": """
def remove_input(weight, inverse):
    h = torch.linalg.inv(inverse.double())
    best = None
    for j in range(len(h)):
        rest = [i for i in range(len(h)) if i != j]
        others = weight.double() @ torch.linalg.solve(h[rest][:, rest], h[rest]).T
        change = -weight.double().clone()
        change[:, rest] += others
        cost = ((change @ h) * change).sum().item()
        if best is None or cost < best[0]:
            best = (cost, j, others.float())
    return best[1], best[2]
""",
    },
    "metadata": {
        "a loop": """
def compress(weight):
    rows, values, codes = len(weight), [], []
    for row in weight:
        for start in range(0, len(row), 8):
            byte = 0
            for half in (0, 4):
                where = [i for i in range(4) if row[start + half + i] != 0]
                values += [row[start + half + i] for i in where]
                byte |= (where[0] | where[1] << 2) << half
            codes.append(byte)
    return torch.stack(values).view(rows, -1), torch.tensor(codes, dtype=torch.uint8).view(rows, -1)


def decompress(values, metadata):
    weight = torch.zeros(len(values), 2 * values.shape[1]).to(values.dtype)
    for r in range(len(values)):
        for k in range(values.shape[1]):
            place = int(metadata[r, k // 4]) >> 2 * (k % 4) & 3
            weight[r, 4 * (k // 2) + place] = values[r, k]
    return weight
""",
        "einsum": [
            ("(nibbles[..., 0] | nibbles[..., 1] << 4)", 'torch.einsum("rgk,k->rg", nibbles, torch.tensor([1, 16]))')
        ],
        "masked": [("groups.gather(-1, places).reshape(rows, -1)", "weight[weight != 0].reshape(rows, -1)")],
    },
    "plan": {
        "finer steps": [("steps = forward(weights, inputs), 20", "steps = forward(weights, inputs), 40")],
        "float64": [
            (
                "dense, steps =",
                "weights = [w.double() for w in weights]\n    inputs = inputs.double()\n    dense, steps =",
            )
        ],
        "lowest thirds of all weights": """
def plan(weights, inputs, sparsity):
    dense, n = forward(weights, inputs), len(weights)
    alone = []
    for i in range(n):
        changed = forward([pruned(w, sparsity) if i == j else w for j, w in enumerate(weights)], inputs)
        alone.append((changed - dense).norm().item())
    order = sorted(range(n), key=alone.__getitem__)
    best, chosen = math.inf, [sparsity] * n
    for span in [x / 50 for x in range(16)]:
        tried = [0.0] * n
        for rank, i in enumerate(order):
            tried[i] = sparsity + span * (1 - 2 * rank / (n - 1))
        changed = forward([pruned(w, s) for w, s in zip(weights, tried)], inputs)
        if (changed - dense).norm() < best:
            best, chosen = (changed - dense).norm(), tried
    return chosen
""",
    },
    "clinic": {
        "float64": [('patient["norms"].any()', 'patient["norms"].double().sum() > 0')],
        "sum for any": [
            ('patient["weight"][~patient["mask"]].any()', '(patient["weight"] * ~patient["mask"]).abs().sum() > 0')
        ],
        "where": [('patient["weight"] * patient["mask"]', 'torch.where(patient["mask"], patient["weight"], 0.0)')],
        "group by group": [("(groups.sum(-1) == 2).all()", "all(int(g.sum()) == 2 for row in groups for g in row)")],
    },
}
