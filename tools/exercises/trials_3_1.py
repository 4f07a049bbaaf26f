"""Lab 3.1: mistakes that students make, and right answers that look otherwise. See `tools.exercises.trials`."""

FAULTS = {
    "grid": {
        "one step too many": [("(2**bits - 1)", "2**bits")],
        "range without zero": [(".clamp(max=0)", ""), (".clamp(min=0)", "")],
        "zero point not rounded": [(".round()", "")],
        "no guard for a group of zeros": [(".clamp(min=1e-7)", "")],
        "sign of the zero point": [("(-low / scale)", "(low / scale)")],
        "symmetric range": [("((high - low)", "((2 * torch.maximum(high, -low))")],
    },
    "rtn": {
        "rounds down": [(".round()", ".floor()")],
        "no clamp": [(".clamp(0, 2**bits - 1)", "")],
        "groups laid out wrongly": [("t.repeat_interleave(group_size, dim=1)", "t.repeat(1, group_size)")],
        "zero point subtracted": [("/ scale + zero", "/ scale - zero")],
        "decode forgets the zero point": [("(codes.float() - zero) * scale", "codes.float() * scale")],
        "codes stay floats": [(".to(torch.uint8)", "")],
        "clamped to one code more": [("2**bits - 1", "2**bits")],
    },
    "pack": {
        "highest bits first": [("<< (4 * i)", "<< (28 - 4 * i)")],
        "no mask": [("& 15", "")],
        "eight neighbours of the output": [
            ("codes.to(torch.int64).reshape(-1, 8, codes.shape[1])", "codes.to(torch.int64).reshape(8, -1, 6).mT.mT"),
            ("codes[:, i] <<", "codes[i] <<"),
            ("torch.zeros(len(codes), codes.shape[2]", "torch.zeros(codes.shape[1], codes.shape[2]"),
        ],
        "stays int64": [("words.to(torch.int32)", "words")],
        "shifts by three": [("4 * i", "3 * i")],
        "stacked on the wrong side": [("torch.stack(codes, dim=1)", "torch.stack(codes, dim=0)")],
    },
    "hessian": {
        "mean of means": [
            ("total += x.T @ x", "total += x.T @ x / len(x)"),
            ("2 * total / tokens", "2 * total / len(batches)"),
        ],
        "factor 2 forgotten": [("2 * total", "total")],
        "counts batches, not tokens": [("tokens += len(x)", "tokens += len(batch)")],
        "only the last batch": [("total += x.T @ x", "total = x.T @ x")],
        "only the diagonal": [("x.T @ x", "torch.diag(x.square().sum(0))")],
        "centred": [("x.T @ x", "(x - x.mean(0)).T @ (x - x.mean(0))")],
    },
    "update": {
        "H instead of its inverse": [("error = ", "inverse = torch.linalg.inv(inverse)\n    error = ")],
        "sign": [("weight[:, 1:] - ", "weight[:, 1:] + ")],
        "no divisor": [(" / inverse[0, 0]", "")],
        "divisor's root": [("/ inverse[0, 0]", "/ inverse[0, 0].sqrt()")],
        "wrong row": [("inverse[0, 1:]", "inverse[-1, 1:]")],
        "no update": [(" - error[:, None] * inverse[0, 1:]", "")],
    },
    "gptq": {
        "no compensation": [("work[:, i + 1 :] -= ", "work[:, i + 1 :] -= 0 * ")],
        "compensation with the wrong sign": [("work[:, i + 1 :] -= ", "work[:, i + 1 :] += ")],
        "H in place of its inverse": [("torch.linalg.inv(damped)", "damped")],
        "inverse never reduced": [
            ("torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)", "torch.linalg.inv(damped)")
        ],
        "error from the first weights": [("error = (work[:, i]", "error = (weight[:, i]")],
        "only the next column": [("i + 1 :]", "i + 1 : i + 2]")],
        "no damping": [("damp * hessian", "0 * hessian")],
        "lower factor": [(", upper=True", "")],
        "no clamp": [(".clamp(0, 2**bits - 1)", "")],
    },
    "act_order": {
        "ascending": [("descending=True", "descending=False")],
        "only rows of H permuted": [("hessian[order][:, order]", "hessian[order]")],
        "not put back": [("codes[:, order.argsort()]", "codes")],
        "put back with the order itself": [("order.argsort()", "order")],
        "grid not permuted": [("scale[:, order], zero[:, order]", "scale, zero")],
        "weights not permuted": [("weight[:, order]", "weight")],
    },
    "awq": {
        "the worst": [("(math.inf, 0.0, weight)", "(-1.0, 0.0, weight)"), ("error < best[0]", "error > best[0]")],
        "error of the weights": [(" @ inputs.T).square()", ").square()")],
        "scale not divided out": [("group_size) / scale", "group_size)")],
        "weights divided": [("weight * scale", "weight / scale"), ("group_size) / scale", "group_size) * scale")],
        "always the last": [("if error < best[0]:", "if True:")],
        "the first that is better": [("best = (error, alpha, approximation)", "best = (-1, alpha, approximation)")],
        "mean of powers": [
            ("inputs.abs().mean(0).clamp(min=1e-4) ** alpha", "(inputs.abs().clamp(min=1e-4) ** alpha).mean(0)")
        ],
        "α as a tensor": [("(error, alpha, approximation)", "(error, torch.tensor(alpha), approximation)")],
        "never rounded": [("quantized(weight * scale, bits, group_size)", "(weight * scale)")],
    },
    "bytes": {
        "no group index": [(" + 4 * columns", "")],
        "zero points in 16 bits": [("groups * bits // 8 + 2 * groups", "2 * groups + 2 * groups")],
        "scales in 32 bits": [("2 * groups", "4 * groups")],
        "one group a row": [("rows * columns // group_size", "rows")],
        "bits for bytes": [("rows * columns * bits // 8", "rows * columns * bits")],
        "others forgotten": [("total = 2 * others", "total = 0")],
        "a float": [("return total", "return float(total)")],
    },
    "foreign": {
        "the other way round": [("1 if difference", "2 if difference"), ("else 2", "else 1")],
        "always version 1": [("1 if difference.mean() > 0.5 else 2", "1")],
        "always version 2": [("1 if difference.mean() > 0.5 else 2", "2")],
        "the correction has the wrong sign": [("- (2 - version)", "+ (2 - version)")],
        "not corrected": [("(difference - (2 - version))", "difference")],
        "by the first zero point": [("difference.mean() > 0.5", "stored.flatten()[0] == 7")],
    },
    "triton": {
        "highest nibble first": [("4 * place)", "(28 - 4 * place))")],
        "no mask of the code": [(" & 15", "")],
        "zero point forgotten": [("(code - origin[:, None])", "code")],
        "zero point added": [("code - origin", "code + origin")],
        "one grid a row": [("row * groups + group", "row * groups")],
        "words in the other order": [("8 * at + place", "at + place * groups * WORDS")],
        "last group left out": [("range(groups)", "range(groups - 1)")],
        "only seven codes": [("range(8)", "range(7)")],
        "writes behind the outputs": [("tl.store(out + row, total, mask=here)", "tl.store(out + row, total)")],
    },
    "clinic": {
        "one direction only": [(".mean().abs() > 0.5", ".mean() > 0.5")],
        "everybody is ill": [('> 0.5 else "healthy"', '> -1 else "healthy"')],
        "layers are not mended": [(" - steps * patient", " - 0 * steps * patient")],
        "damps every channel": [("torch.diag(dead * diagonal", "torch.diag(torch.ones_like(diagonal) * diagonal")],
        "adds a tiny number": [("diagonal[~dead].mean()", "1e-6")],
        "mean with the dead": [("diagonal[~dead].mean()", "diagonal.mean()")],
        "per word": [('patient["tokens"]', 'patient["words"]')],
        "log called healthy": [('< 0.01 else "per word"', '< 9 else "per word"')],
    },
}

NOTHING = {  # answers that do nothing, or not what was asked for
    "grid": {"one grid for all": "def find_grid(w, bits):\n    return torch.tensor(1000.0), torch.tensor(0.0)\n"},
    "rtn": {
        "as it came": """
def encode(weight, scale, zero, group_size, bits):
    return weight


def decode(codes, scale, zero, group_size):
    return codes
"""
    },
    "pack": {"as it came": "def pack(codes):\n    return codes\n\n\ndef unpack(packed):\n    return packed\n"},
    "hessian": {
        "identity": "def hessian(batches):\n    return torch.eye(batches[0].shape[-1])\n",
    },
    "update": {"as it came": "def update(weight, column, inverse):\n    return weight[:, 1:]\n"},
    "gptq": {
        "RTN": """
def gptq(weight, hessian, scale, zero, bits, damp=0.01):
    return (weight / scale + zero).round().clamp(0, 2**bits - 1).to(torch.uint8)
""",
        "int64": [("codes.to(torch.uint8)", "codes.to(torch.int64)")],
    },
    "act_order": {
        "from left to right": """
def gptq_act_order(weight, hessian, scale, zero, bits):
    return gptq(weight, hessian, scale, zero, bits)
"""
    },
    "awq": {
        "no scale": """
def awq(weight, inputs, alphas, bits, group_size):
    return 0.0, quantized(weight, bits, group_size)
"""
    },
    "bytes": {"nothing": "def checkpoint_bytes(shapes, others, bits, group_size):\n    return 0\n"},
    "foreign": {"as it came": "def read_foreign(codes, stored, scale):\n    return 2, codes\n"},
    "triton": {
        "writes nothing": """
def product(x, words, scale, zero):
    return torch.full((-(-len(words) // ROWS) * ROWS,), math.nan)
""",
        "zeros": """
def product(x, words, scale, zero):
    return torch.zeros(-(-len(words) // ROWS) * ROWS)
""",
    },
    "clinic": {
        "everybody is healthy": """
def diagnose(patient):
    return "healthy"


def mend(patient):
    return patient.get("weight", patient.get("hessian", patient.get("perplexity")))
"""
    },
}

VARIANTS = {
    "grid": {
        "float64": [("w.min()", "w.double().min()"), ("w.max()", "w.double().max()")],
        "through a zero appended": """
def find_grid(w, bits):
    both = torch.cat([w, torch.zeros(1)])
    step = (both.max() - both.min()) / (2**bits - 1)
    if step == 0:
        step = torch.tensor(1.0)
    return step, torch.round(-both.min() / step)
""",
        "numbers in place of tensors": """
def find_grid(w, bits):
    low, high = min(0.0, w.min().item()), max(0.0, w.max().item())
    scale = max((high - low) / (2**bits - 1), 1e-6)
    return scale, float(round(-low / scale))
""",
    },
    "rtn": {
        "group by group": """
def encode(weight, scale, zero, group_size, bits):
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for g in range(scale.shape[1]):
        s = slice(g * group_size, (g + 1) * group_size)
        codes[:, s] = torch.clamp(torch.round(weight[:, s] / scale[:, g : g + 1] + zero[:, g : g + 1]), 0, 2**bits - 1)
    return codes


def decode(codes, scale, zero, group_size):
    group = torch.arange(codes.shape[1]) // group_size
    return scale[:, group] * (codes - zero[:, group])
""",
        "float64": [("weight / scale", "weight.double() / scale.double()"), ("codes.float()", "codes.double()")],
        "reshaped": """
def encode(weight, scale, zero, group_size, bits):
    w = weight.reshape(weight.shape[0], -1, group_size)
    return (w / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1).reshape(weight.shape).byte()


def decode(codes, scale, zero, group_size):
    c = codes.reshape(codes.shape[0], -1, group_size).float()
    return ((c - zero[..., None]) * scale[..., None]).reshape(codes.shape)
""",
    },
    "pack": {
        "every eighth row": """
def pack(codes):
    words = sum(codes[i::8].long() * 16**i for i in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack(packed):
    codes = torch.zeros(8 * packed.shape[0], packed.shape[1], dtype=torch.uint8)
    for i in range(8):
        codes[i::8] = ((packed.long() >> 4 * i) % 16).byte()
    return codes
""",
        "einsum": """
def pack(codes):
    places = 16 ** torch.arange(8)
    return torch.einsum("wij,i->wj", codes.long().unflatten(0, (-1, 8)), places).int()


def unpack(packed):
    shifts = 4 * torch.arange(8).view(1, 8, 1)
    return (packed[:, None].long() >> shifts & 15).flatten(0, 1).byte()
""",
        "column by column": """
def pack(codes):
    out = torch.zeros(len(codes) // 8, codes.shape[1], dtype=torch.int32)
    for j in range(codes.shape[1]):
        for r in range(len(out)):
            word = 0
            for i in reversed(range(8)):
                word = word * 16 + int(codes[8 * r + i, j])
            out[r, j] = word - 2**32 if word >= 2**31 else word
    return out


def unpack(packed):
    rows = []
    for row in packed.tolist():
        for i in range(8):
            rows.append([(word % 2**32) // 16**i % 16 for word in row])
    return torch.tensor(rows, dtype=torch.uint8)
""",
    },
    "hessian": {
        "float64": [(".float()", ".double()"), ("torch.zeros(width, width)", "torch.zeros(width, width).double()")],
        "einsum": [("x.T @ x", 'torch.einsum("ti,tj->ij", x, x)')],
        "all at once": """
def hessian(batches):
    x = torch.cat([batch.flatten(0, -2) for batch in batches])
    return 2 * x.mT.matmul(x) / x.shape[0]
""",
        "running mean": """
def hessian(batches):
    h, n = 0, 0
    for batch in batches:
        x = batch.flatten(0, 1)
        h = h * (n / (n + len(x))) + 2 / (n + len(x)) * x.T @ x
        n += len(x)
    return h
""",
    },
    "update": {
        "float64": [
            ("weight[:, 0] - column", "weight[:, 0].double() - column"),
            ("* inverse", "* inverse.double()"),
        ],
        "einsum": [("error[:, None] * inverse[0, 1:]", 'torch.einsum("o,i->oi", error, inverse[0, 1:])')],
        "from H": """
def update(weight, column, inverse):
    h = torch.linalg.inv(inverse.double())
    step = torch.linalg.solve(h[1:, 1:], h[1:, 0])
    return weight[:, 1:] + ((weight[:, 0] - column)[:, None] * step).float()
""",
        "column by column": """
def update(weight, column, inverse):
    rest = weight[:, 1:].clone()
    for j in range(rest.shape[1]):
        rest[:, j] += (column - weight[:, 0]) * inverse[j + 1, 0] / inverse[0, 0]
    return rest
""",
    },
    "gptq": {
        "elimination": """
def gptq(weight, hessian, scale, zero, bits, damp=0.01):
    w, n = weight.clone(), len(hessian)
    inverse = torch.linalg.inv(hessian + damp * hessian.diagonal().mean() * torch.eye(n))
    codes = torch.zeros(weight.shape)
    for i in range(n):
        codes[:, i] = torch.clamp(torch.round(w[:, i] / scale[:, i] + zero[:, i]), 0, 2**bits - 1)
        error = w[:, i] - scale[:, i] * (codes[:, i] - zero[:, i])
        w[:, i + 1 :] -= torch.outer(error / inverse[i, i], inverse[i, i + 1 :])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes.byte()
""",
        "float64": [
            ("weight.clone(), torch.empty_like(weight)", "weight.double(), torch.empty_like(weight)"),
            ("damped = hessian +", "hessian = hessian.double()\n    damped = hessian +"),
        ],
        "einsum": [("error[:, None] * factor[i, i + 1 :]", 'torch.einsum("o,i->oi", error, factor[i, i + 1 :])')],
        "row by row": """
def gptq(weight, hessian, scale, zero, bits, damp=0.01):
    damped = hessian.clone()
    damped.diagonal().add_(damp * hessian.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    rows = []
    for w, s, z in zip(weight.clone(), scale, zero):
        row = []
        for i in range(len(w)):
            code = (w[i] / s[i] + z[i]).round().clamp(0, 2**bits - 1)
            w[i + 1 :] -= (w[i] - (code - z[i]) * s[i]) / u[i, i] * u[i, i + 1 :]
            row.append(int(code))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.uint8)
""",
    },
    "act_order": {
        "negative": [("argsort(descending=True)", "neg().argsort()")],
        "written back": [
            (
                "return codes[:, order.argsort()]",
                "back = torch.empty_like(codes)\n    back[:, order] = codes\n    return back",
            )
        ],
        "permutation matrix": """
def gptq_act_order(weight, hessian, scale, zero, bits):
    order = torch.argsort(torch.diag(hessian), descending=True)
    p = torch.eye(len(order))[order]
    codes = gptq(weight @ p.T, p @ hessian @ p.T, scale @ p.T, zero @ p.T, bits)
    return (codes.float() @ p).byte()
""",
    },
    "awq": {
        "normalized": [("** alpha\n", "** alpha\n        scale = scale / (scale.max() * scale.min()).sqrt()\n")],
        "float64": [(").square().sum().item()", ").double().square().sum().item()")],
        "by the Hessian": [
            (
                "((approximation - weight) @ inputs.T).square().sum().item()",
                "torch.einsum('oi,ij,oj->', approximation - weight, inputs.T @ inputs, approximation - weight).item()",
            )
        ],
        "all first": """
def awq(weight, inputs, alphas, bits, group_size):
    size = inputs.abs().mean(0)
    tried = [quantized(weight * size**a, bits, group_size) / size**a for a in alphas]
    errors = [torch.linalg.norm(inputs @ (t - weight).T) for t in tried]
    best = int(torch.stack(errors).argmin())
    return alphas[best], tried[best]
""",
    },
    "bytes": {
        "in bits": """
def checkpoint_bytes(shapes, others, bits, group_size):
    count = 16 * others
    for out, inp in shapes:
        count += bits * out * inp + (bits + 16) * out * (inp // group_size) + 32 * inp
    return count // 8
""",
        "other order": [("for rows, columns in shapes:", "for rows, columns in reversed(shapes):")],
        "from empty tensors": """
def checkpoint_bytes(shapes, others, bits, group_size):
    total = torch.empty(others, dtype=torch.bfloat16).nbytes
    for out, inp in shapes:
        g = inp // group_size
        total += torch.empty(inp * bits // 32, out, dtype=torch.int32).nbytes
        total += torch.empty(g, out * bits // 32, dtype=torch.int32).nbytes
        total += torch.empty(g, out, dtype=torch.float16).nbytes + torch.empty(inp, dtype=torch.int32).nbytes
    return total
""",
    },
    "foreign": {
        "float64": [("codes.float()", "codes.double()")],
        "median": [("difference.mean() > 0.5", "difference.mean(1).median() > 0.5")],
        "nearer of two": """
def read_foreign(codes, stored, scale):
    group = torch.arange(codes.shape[1]) // (codes.shape[1] // stored.shape[1])
    read = {v: (codes.float() - stored[:, group] - (2 - v)) * scale.float()[:, group] for v in (1, 2)}
    version = min(read, key=lambda v: abs((codes.float() - stored[:, group] - (2 - v)).mean()))
    return version, read[version]
""",
    },
    "triton": {
        "zero point apart": [
            (
                "part += tl.sum((code - origin[:, None]) * tl.load(x + 8 * at + place)[None, :], 1)",
                "inputs = tl.load(x + 8 * at + place)\n"
                "            part += tl.sum(code * inputs[None, :], 1) - origin * tl.sum(inputs, 0)",
            )
        ],
        "unrolled, a scale for each weight": [
            ("range(8)", "tl.static_range(8)"),
            ("(code - origin[:, None])", "(code - origin[:, None]) * step[:, None]"),
            (
                "part = tl.zeros",
                "step = tl.load(scale + row * groups + group, mask=here, other=0)\n        part = tl.zeros",
            ),
            ("tl.load(scale + row * groups + group, mask=here, other=0) * part", "part"),
        ],
        "a tile of columns": """
@triton.jit
def kernel(x, words, scale, zero, out, outputs, groups, ROWS: tl.constexpr, WORDS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    here = row < outputs
    total = tl.zeros((ROWS, 8 * WORDS), tl.float32)
    for group in range(groups):
        column = group * WORDS * 8 + tl.arange(0, WORDS * 8)[None, :]
        word = tl.load(words + row * groups * WORDS + column // 8, mask=here, other=0)
        code = (word >> (column % 8) * 4) & 15
        step = tl.load(scale + row * groups + group, mask=here, other=0)
        total += (code - tl.load(zero + row * groups + group, mask=here, other=0)) * step * tl.load(x + column)
    tl.store(out + row, tl.sum(total, 1, keep_dims=True), mask=here)


def product(x, words, scale, zero):
    return launch(kernel, x, words, scale, zero)
""",
    },
    "clinic": {
        "float64": [('(patient["weight"] / patient["scale"])', '(patient["weight"].double() / patient["scale"])')],
        "median": [(".mean().abs() > 0.5", ".median().abs() > 0.5")],
        "by factorization": [
            ('(patient["hessian"].diagonal() == 0).any()', 'torch.linalg.cholesky_ex(patient["hessian"]).info')
        ],
        "nats": [
            (
                'abs(patient["perplexity"] / per_token - 1) < 0.01',
                'abs(math.log(patient["perplexity"]) - patient["nll"] / patient["tokens"]) < 0.02',
            )
        ],
    },
}
