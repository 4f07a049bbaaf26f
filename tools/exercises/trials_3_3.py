"""Lab 3.3: mistakes that students make, and right answers that look otherwise. See `tools.exercises.trials`."""

FAULTS = {
    "blocks": {
        "cosine of the mean": [
            (
                "cosine = (before * after)",
                "before, after = before.mean(0, keepdim=True), after.mean(0, keepdim=True)\n        cosine = (before * after)",
            )
        ],
        "cosine itself": [("(1 - cosine)", "cosine")],
        "least influential": [("reverse=True", "reverse=False")],
        "in order of influence": [("return sorted(best), influence", "return best, influence")],
        "distance for cosine": [("(1 - cosine).mean()", "(after - before).norm(dim=-1).mean()")],
        "one cosine of all": [("sum(-1)", "sum()"), ("norm(dim=-1)", "norm()")],
        "off by one": [("return sorted(best)", "return [b + 1 for b in sorted(best)]")],
    },
    "leak": {
        "aligned only": [("for i in range(len(window) - n + 1)", "for i in range(0, len(window) - n + 1, n)")],
        "whole windows": [("tuple(window[i : i + n]) for i in range(len(window) - n + 1)", "tuple(window)")],
        "one piece short": [("len(window) - n + 1", "len(window) - n")],
        "over the ends": [("set().union(*map(pieces, train.tolist()))", "pieces(train.flatten().tolist())")],
        "any tokens, not in a row": [
            ("pieces(window) & seen", "len(set(window) & set(train.flatten().tolist())) >= n")
        ],
        "the clean ones": [("if pieces(window) & seen", "if not pieces(window) & seen")],
        "sets for sequences": [("tuple(window[i : i + n])", "frozenset(window[i : i + n // 2])")],
    },
    "topk": {
        "no tail": [("torch.cat((values, other), -1)", "values.log_softmax(-1)")],
        "tail by subtraction": [
            (
                "log_p.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)",
                "(1 - values.exp().sum(-1, keepdim=True)).log()",
            )
        ],
        "tail as a mean": [
            (
                "return ids, torch.cat((values, other), -1)",
                "return ids, torch.cat((values, other - math.log(logits.shape[-1] - k)), -1)",
            )
        ],
        "reverse": [("(log_probs.exp() * (log_probs - outcomes))", "(outcomes.exp() * (outcomes - log_probs))")],
        "mean over outcomes": [(".sum(-1).mean()", ".mean()")],
        "summed over tokens": [(".sum(-1).mean()", ".sum()")],
        "students' own top k": [("log_q.gather(-1, ids)", "log_q.topk(ids.shape[-1], -1).values")],
        "tail left out of the loss": [
            (
                "(log_probs.exp() * (log_probs - outcomes)).sum(-1)",
                "(log_probs.exp() * (log_probs - outcomes))[:, :-1].sum(-1)",
            )
        ],
        "logits for probabilities": [("log_p = logits.log_softmax(-1)", "log_p = logits")],
    },
    "ce": {
        "not shifted": [("logits[:, :-1], ids[:, 1:], real[:, 1:]", "logits, ids, real")],
        "shifted the other way": [
            ("logits[:, :-1], ids[:, 1:], real[:, 1:]", "logits[:, 1:], ids[:, :-1], real[:, :-1]")
        ],
        "padding counted": [("loss[real].mean()", "loss.mean()")],
        "padding as zeros": [("loss[real].mean()", "(loss * real).mean()")],
        "mask of the wrong place": [("real[:, 1:]", "real[:, :-1]")],
        "mean of rows": [("loss[real].mean()", "((loss * real).sum(1) / real.sum(1)).mean()")],
        "overflows": [("logits.logsumexp(-1)", "logits.exp().sum(-1).log()")],
        "sum": [("loss[real].mean()", "loss[real].sum()")],
    },
    "kd": {
        "no T²": [("temperature**2 * soft", "soft")],
        "T": [("temperature**2", "temperature")],
        "reverse": [("log_p.exp() * (log_p - log_q)", "log_q.exp() * (log_q - log_p)")],
        "mean over the vocabulary": [(".sum(-1).mean()", ".mean()")],
        "teacher's entropy left out": [("(log_p - log_q)", "(-log_q)")],
        "α the other way": [("alpha * hard + (1 - alpha)", "(1 - alpha) * hard + alpha")],
        "CE with temperature": [("hard = -student.log_softmax", "hard = -(student / temperature).log_softmax")],
        "softmax, then log": [("((z / temperature).log_softmax(-1)", "((z / temperature).softmax(-1).log()")],
        "temperature of the student alone": [
            ("for z in (student, teacher))", "for z in (student, teacher * temperature))")
        ],
    },
    "gradient": {
        "sign": [("(q - p)", "(p - q)")],
        "no factor": [("temperature * (q - p)", "(q - p)")],
        "T²": [("temperature * (q - p)", "temperature**2 * (q - p)")],
        "sum over tokens": [(" / len(student)", "")],
        "temperature forgotten": [("(z / temperature)", "z")],
        "of the reverse divergence": [
            (
                "return temperature * (q - p)",
                "r = q.log() - p.log()\n    return temperature * q * (r - (q * r).sum(-1, keepdim=True))",
            )
        ],
        "mean over the vocabulary": [("/ len(student)", "/ student.numel()")],
    },
    "relation": {
        "teacher's width for both": [("math.sqrt(v.shape[-1])", "math.sqrt(teacher.shape[-1])")],
        "not scaled": [(" / math.sqrt(v.shape[-1])", "")],
        "sum for mean": [(".sum(-1).mean()", ".sum()")],
        "mean over everything": [(".sum(-1).mean()", ".mean()")],
        "reverse": [("log_p.exp() * (log_p - log_q)", "log_q.exp() * (log_q - log_p)")],
        "features for tokens": [("v @ v.mT", "v.mT @ v")],
        "cosines": [("((v @ v.mT", "((v / v.norm(dim=-1, keepdim=True) @ (v / v.norm(dim=-1, keepdim=True)).mT")],
        "squared differences": [
            ("(log_p.exp() * (log_p - log_q)).sum(-1)", "(log_p.exp() - log_q.exp()).square().sum(-1)")
        ],
    },
    "train": {
        "uphill": [("weight -= ", "weight += ")],
        "sum for mean": [(" / len(rows)", "")],
        "only the first batch": [
            ("inputs[rows], teacher[rows].log_softmax(-1)", "inputs[batches[0]], teacher[batches[0]].log_softmax(-1)")
        ],
        "loss after the step": [
            ("        losses.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())\n", ""),
            (
                "gradient.T @ x",
                "gradient.T @ x\n        losses.append((log_p.exp() * (log_p - (x @ weight.T).log_softmax(-1))).sum(-1).mean().item())",
            ),
        ],
        "hard labels": [("teacher[rows].log_softmax(-1)", "(50 * teacher[rows]).log_softmax(-1)")],
        "gradients never cleared": [
            ("weight.clone(), []", "weight.clone(), []\n    total = torch.zeros_like(weight)"),
            ("weight -= lr * gradient.T @ x", "total += gradient.T @ x\n        weight -= lr * total"),
        ],
        "no step": [("weight -= lr", "weight -= 0 * lr")],
        "reverse divergence": [("log_q.exp() - log_p.exp()", "log_q.exp() * (log_q - log_p)")],
        "decay": [("weight -= lr *", "weight *= 0.95\n        weight -= lr *")],
    },
    "compare": {
        "unpaired": [("difference.std().item()", "(a.var() + b.var()).sqrt().item()")],
        "no root of n": [("math.sqrt(len(a))", "len(a)")],
        "standard deviation": [(" / math.sqrt(len(a))", "")],
        "not exponentiated": [("math.exp(mean + z * error)", "1 + mean + z * error")],
        "the other way round": [("a - b", "b - a")],
        "one standard error": [("-1.96, 1.96", "-1, 1")],
        "divided by n": [("difference.std()", "difference.std(correction=0)")],
        "ends swapped": [("-1.96, 1.96", "1.96, -1.96")],
    },
    "policy": {
        "teacher writes": [("log_q[before].exp().cumsum(-1)", "log_p[before].exp().cumsum(-1)")],
        "forward divergence": [
            (
                "log_q[before].exp() * (log_q[before] - log_p[before])",
                "log_p[before].exp() * (log_p[before] - log_q[before])",
            )
        ],
        "always after the start": [
            ("        before = (cumulative", "        token = (cumulative"),
            ("written.append(before)", "written.append(token)"),
        ],
        "the likeliest": [
            ("(cumulative <= draw[:, None]).sum(-1).clamp(max=len(student) - 1)", "log_q[before].argmax(-1)")
        ],
        "off by one": [("(cumulative <= draw[:, None]).sum(-1)", "((cumulative <= draw[:, None]).sum(-1) + 1)")],
        "summed": [("torch.stack(divergences).mean()", "torch.stack(divergences).sum()")],
        "divergence one too late": [("torch.stack(divergences).mean()", "torch.stack(divergences[1:]).mean()")],
        "columns for rows": [
            (
                "log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)",
                "log_q, log_p = student.T.log_softmax(-1), teacher.T.log_softmax(-1)",
            )
        ],
    },
    "clinic": {
        "head compared with the embedding": [
            ('patient["head"].any()', '(patient["head"] == patient["embedding"]).all()')
        ],
        "embedding for everybody": [('patient["embedding"] if patient["tied"] else None', 'patient["embedding"]')],
        "zeros kept": [("saved if ill else", "patient['head'] if ill else")],
        "everybody has padding": [("< 1e-3 * wanted", "< 0")],
        "padding as zeros": [
            ('patient["losses"][patient["real"]].mean().item()', '(patient["losses"] * patient["real"]).mean().item()')
        ],
        "never shifted": [('"shifted" if here > following', '"shifted" if False')],
        "shifted the wrong way": [('patient["teacher"][1:] if ill', 'patient["teacher"][:-1] if ill')],
        "rolled": [('patient["teacher"][1:] if ill', 'patient["teacher"].roll(1, 0)[1:] if ill')],
    },
}

NOTHING = {  # answers that do nothing, or not what was asked for
    "blocks": {
        "the first": "def choose_blocks(hidden, keep):\n    return list(range(keep)), [1.0] * (len(hidden) - 1)\n"
    },
    "leak": {
        "none": "def leaks(train, test, n):\n    return []\n",
        "all": "def leaks(train, test, n):\n    return list(range(len(test)))\n",
    },
    "topk": {
        "the first": """
def top_k(logits, k):
    return torch.arange(k).expand(len(logits), k), logits[:, : k + 1]


def top_k_kl(student_logits, ids, log_probs):
    return torch.tensor(0.0)
"""
    },
    "ce": {"zero": "def next_token_loss(logits, ids, real):\n    return torch.tensor(0.0)\n"},
    "kd": {"zero": "def kd_loss(student, teacher, labels, alpha, temperature):\n    return torch.tensor(0.0)\n"},
    "gradient": {
        "zero": "def kd_gradient(student, teacher, temperature):\n    return torch.zeros_like(student)\n",
        "the difference of logits": """
def kd_gradient(student, teacher, temperature):
    return (student - teacher) - (student - teacher).mean(-1, keepdim=True)
""",
    },
    "relation": {"zero": "def relation_loss(student, teacher):\n    return torch.tensor(0.0)\n"},
    "train": {
        "as it came": """
def distil(inputs, teacher, weight, batches, lr):
    return weight, [1.0] * len(batches)
"""
    },
    "compare": {"about one": "def compare(a, b):\n    return 1.01, 1.005, 1.015\n"},
    "policy": {
        "zeros": """
def on_policy(student, teacher, start, noise):
    return torch.zeros_like(noise).long(), torch.tensor(0.0)
"""
    },
    "clinic": {
        "everybody is healthy": """
def diagnose(patient):
    return "healthy"


def mend(patient):
    return patient.get("head", patient.get("reported", patient.get("teacher")))
"""
    },
}

VARIANTS = {
    "blocks": {
        "float64": [("(before * after).sum(-1)", "(before.double() * after.double()).sum(-1)")],
        "einsum": [("(before * after).sum(-1)", 'torch.einsum("td,td->t", before, after)')],
        "normalized first": """
def choose_blocks(hidden, keep):
    unit = [h / h.norm(dim=-1, keepdim=True) for h in hidden]
    influence = [float(1 - (unit[i] * unit[i + 1]).sum(-1).mean()) for i in range(len(unit) - 1)]
    return sorted(torch.tensor(influence).topk(keep).indices.tolist()), influence
""",
        "of PyTorch": [
            (
                "(before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))",
                "torch.cosine_similarity(before, after, dim=-1)",
            )
        ],
    },
    "leak": {
        "by comparing tensors": """
def leaks(train, test, n):
    pieces = train.unfold(1, n, 1).reshape(-1, n)
    found = []
    for number, window in enumerate(test.unfold(1, n, 1)):
        if (window[:, None] == pieces[None]).all(-1).any():
            found.append(number)
    return found
""",
        "as text": """
def leaks(train, test, n):
    texts = [" " + " ".join(map(str, window)) + " " for window in train.tolist()]
    found = []
    for number, window in enumerate(test.tolist()):
        pieces = [" " + " ".join(map(str, window[i : i + n])) + " " for i in range(len(window) - n + 1)]
        if any(piece in text for piece in pieces for text in texts):
            found.append(number)
    return found
""",
        "unfold": """
def leaks(train, test, n):
    seen = set(map(tuple, train.unfold(-1, n, 1).reshape(-1, n).tolist()))
    return [i for i, w in enumerate(test.unfold(-1, n, 1).tolist()) if not seen.isdisjoint(map(tuple, w))]
""",
    },
    "topk": {
        "float64": [
            ("logits.log_softmax(-1)\n    values", "logits.double().log_softmax(-1)\n    values"),
            ("student_logits.log_softmax", "student_logits.double().log_softmax"),
        ],
        "sorted": """
def top_k(logits, k):
    log_p, ids = torch.log_softmax(logits, dim=1).sort(dim=1, descending=True)
    return ids[:, :k], torch.hstack([log_p[:, :k], log_p[:, k:].logsumexp(1, keepdim=True)])


def top_k_kl(student_logits, ids, log_probs):
    total = 0.0
    for z, i, p in zip(student_logits, ids, log_probs):
        q = z.log_softmax(0)
        rest = torch.ones(len(q), dtype=torch.bool)
        rest[i] = False
        other = torch.cat([q[i], q[rest].logsumexp(0, keepdim=True)])
        total = total + (p.exp() * (p - other)).sum()
    return total / len(ids)
""",
        "einsum": [
            (
                "(log_probs.exp() * (log_probs - outcomes)).sum(-1).mean()",
                'torch.einsum("tk,tk->t", log_probs.exp(), log_probs - outcomes).mean()',
            )
        ],
    },
    "ce": {
        "float64": [("logits, answers, real = logits[:, :-1]", "logits, answers, real = logits[:, :-1].double()")],
        "log_softmax": [
            (
                "logits.logsumexp(-1) - logits.gather(-1, answers[..., None]).squeeze(-1)",
                "-logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]",
            )
        ],
        "a loop": """
def next_token_loss(logits, ids, real):
    total, count = 0.0, 0
    for z, tokens, mask in zip(logits, ids, real):
        for t in range(len(tokens) - 1):
            if mask[t + 1]:
                total, count = total + torch.logsumexp(z[t], 0) - z[t, tokens[t + 1]], count + 1
    return total / count
""",
        "one-hot": """
def next_token_loss(logits, ids, real):
    one_hot = (ids[:, 1:, None] == torch.arange(logits.shape[-1])).float()
    z = logits[:, :-1] - logits[:, :-1].amax(-1, keepdim=True)
    loss = z.exp().sum(-1).log() - torch.einsum("btv,btv->bt", z, one_hot)
    return (loss * real[:, 1:]).sum() / real[:, 1:].sum()
""",
    },
    "kd": {
        "float64": [("hard = ", "student, teacher = student.double(), teacher.double()\n    hard = ")],
        "einsum": [
            (
                "(log_p.exp() * (log_p - log_q)).sum(-1).mean()",
                'torch.einsum("tv,tv->", log_p.exp(), log_p - log_q) / len(student)',
            )
        ],
        "cross-entropy minus entropy": [
            (
                "(log_p.exp() * (log_p - log_q)).sum(-1).mean()",
                "((log_p.exp() * log_p).sum(-1) - (log_p.exp() * log_q).sum(-1)).mean()",
            )
        ],
        "token by token": """
def kd_loss(student, teacher, labels, alpha, temperature):
    total = 0.0
    for s, t, y in zip(student, teacher, labels):
        q, p = (s / temperature).log_softmax(0), (t / temperature).log_softmax(0)
        soft = temperature**2 * (p.exp() * (p - q)).sum()
        total = total + alpha * (s.logsumexp(0) - s[y]) + (1 - alpha) * soft
    return total / len(student)
""",
    },
    "gradient": {
        "float64": [("(z / temperature)", "(z.double() / temperature)")],
        "token by token": """
def kd_gradient(student, teacher, temperature):
    out = torch.zeros_like(student)
    for row, s, t in zip(out, student, teacher):
        row += (s / temperature).softmax(0) - (t / temperature).softmax(0)
    return out * temperature / len(out)
""",
        "through the Jacobian": """
def kd_gradient(student, teacher, temperature):
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    jacobian = torch.eye(q.shape[-1], dtype=q.dtype) - q[:, None, :]
    return -temperature * torch.einsum("ti,tij->tj", p, jacobian) / len(q)
""",
    },
    "relation": {
        "float64": [("((v @ v.mT", "((v.double() @ v.mT.double()")],
        "einsum": [
            ("(v @ v.mT / math.sqrt(v.shape[-1]))", '(torch.einsum("hid,hjd->hij", v, v) / v.shape[-1] ** 0.5)')
        ],
        "head by head": """
def relation_loss(student, teacher):
    total = 0.0
    for s, t in zip(student, teacher):
        q = (s @ s.T / s.shape[1] ** 0.5).log_softmax(1)
        p = (t @ t.T / t.shape[1] ** 0.5).log_softmax(1)
        total = total + (p.exp() * (p - q)).sum() / len(p)
    return total / len(student)
""",
    },
    "train": {
        "autograd": """
def distil(inputs, teacher, weight, batches, lr):
    weight, losses = weight.clone().requires_grad_(True), []
    for rows in batches:
        log_p = teacher[rows].log_softmax(-1)
        loss = (log_p.exp() * (log_p - (inputs[rows] @ weight.T).log_softmax(-1))).sum(-1).mean()
        weight.grad = None
        loss.backward()
        with torch.no_grad():
            weight -= lr * weight.grad
        losses.append(loss.item())
    return weight.detach(), losses
""",
        "float64": [
            ("weight.clone(), []", "weight.double(), []"),
            ("inputs[rows], teacher", "inputs[rows].double(), teacher.double()"),
        ],
        "einsum": [("gradient.T @ x", 'torch.einsum("tv,tf->vf", gradient, x)')],
        "row by row": """
def distil(inputs, teacher, weight, batches, lr):
    weight, losses = weight.clone(), []
    for rows in batches:
        step, loss = torch.zeros_like(weight), 0.0
        for i in rows.tolist():
            p, q = teacher[i].softmax(0), (weight @ inputs[i]).softmax(0)
            loss += (p * (p.log() - q.log())).sum().item() / len(rows)
            step += torch.outer(q - p, inputs[i]) / len(rows)
        weight = weight - lr * step
        losses.append(loss)
    return weight, losses
""",
    },
    "compare": {
        "float64": [("a - b", "a.double() - b.double()")],
        "by hand": """
def compare(a, b):
    d, n = (a - b).tolist(), len(a)
    m = sum(d) / n
    se = (sum((x - m) ** 2 for x in d) / (n - 1) / n) ** 0.5
    return math.exp(m), math.exp(m - 1.96 * se), math.exp(m + 1.96 * se)
""",
        "ratio and factor": """
def compare(a, b):
    ratio = ((a - b).mean().exp()).item()
    factor = (1.96 * (a - b).var().sqrt() / len(a) ** 0.5).exp().item()
    return ratio, ratio / factor, ratio * factor
""",
    },
    "policy": {
        "float64": [
            (
                "student.log_softmax(-1), teacher.log_softmax(-1)",
                "student.double().log_softmax(-1), teacher.double().log_softmax(-1)",
            )
        ],
        "einsum": [
            (
                "(log_q[before].exp() * (log_q[before] - log_p[before])).sum(-1)",
                'torch.einsum("bv,bv->b", log_q[before].exp(), log_q[before] - log_p[before])',
            )
        ],
        "a loop": """
def on_policy(student, teacher, start, noise):
    q, p, rows, divergence = student.softmax(-1), teacher.softmax(-1), [], 0.0
    for token, draws in zip(start.tolist(), noise):
        row = []
        for draw in draws:
            divergence += (q[token] * (q[token].log() - p[token].log())).sum()
            token = int((q[token].cumsum(0) > draw).int().argmax())
            row.append(token)
        rows.append(row)
    return torch.tensor(rows), divergence / noise.numel()
""",
        "table of divergences": """
def on_policy(student, teacher, start, noise):
    q = student.softmax(-1)
    table = (q * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum(-1)
    tokens = [start]
    for t in range(noise.shape[1]):
        tokens.append(torch.searchsorted(q.cumsum(-1)[tokens[-1]], noise[:, t : t + 1], right=True)[:, 0].clamp(max=len(q) - 1))
    return torch.stack(tokens[1:], 1), table[torch.stack(tokens[:-1], 1)].mean()
""",
    },
    "clinic": {
        "float64": [('patient["losses"][patient["real"]]', 'patient["losses"].double()[patient["real"]]')],
        "by rows": [('patient["head"].any()', 'patient["head"].norm() > 0')],
        "by the rank": [
            ("log_p, ids = patient", "log_p, ids = patient"),
            ('patient["teacher"].log_softmax(-1), patient', 'patient["teacher"], patient'),
        ],
    },
}
