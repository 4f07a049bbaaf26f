"""Exercises of Lab 3.2, with solutions: see `tools.exercises.master` for the form of this file."""

# %% markdown
# # Lab 3.2 練習：親手寫出剪枝 (Exercises)
#
# 共 {points} 分，十一題，由五分鐘到一個晚上，順序與 01 到 04 四個 notebook 大致相同。每題有四格（第 7 題多一格給你的函式）：題目、摺起來的提示、要你寫的一格、測試。所有題目都在很小的張量上，不用網路，也不用 GPU。遮罩 (mask) 一律是布林矩陣 [out, in]，True 的權重留下。
#
# **規則**
#
# - 把 `raise NotImplementedError()` 換成你的程式。答案寫在原來那一格裡；不要刪除、複製、搬動題目原有的格子。其他格不會執行：輔助函式與 import 也要寫在答案那一格裡，`STUDENT` 那一格只能有一行。
# - 答案裡只能匯入 torch、numpy、math 這一類套件。從 `common` 匯入現成的答案不給分。
# - 測試的輸入由 `STUDENT` 抽出，每個人不同；教師另有一組你看不到的輸入。訊息會說哪裡不對，不會說答案。
# - 後面的題目用到前面的函式時，批改用的是參考解答：同一個錯只扣一次分。
#
# 批改：`make grade LAB=3.2`，別處的檔案加 `FROM=路徑`。

# %% student
STUDENT = "your name or number"

# %% given
import math

import torch
from torch import Tensor

# %% checker
from common.course.exercises import close, error_at_output, pair, try_out, typed, worth
from common.course.exercises_3_2 import best_without, linear_sparsities, pruning_error, two_of_four
from common.formats import sparse as sparse_files
from common.methods import pruning


def gaussian(*shape, rng, scale=1.0):
    return torch.randn(*shape, generator=rng) * scale


def correlated(tokens, features, rng, share=2):
    """Inputs whose channels depend on one another and differ in size, as activations do; share: channels a cause."""
    mixing = gaussian(features, features // share, rng=rng)
    sizes = torch.linspace(-1, 1, features).exp()[torch.randperm(features, generator=rng)]
    return (gaussian(tokens, features // share, rng=rng) @ mixing.T + 0.3 * gaussian(tokens, features, rng=rng)) * sizes


def a_mask(mask, shape):
    """`mask`, which should be a boolean tensor of this shape."""
    assert isinstance(mask, Tensor) and mask.dtype == torch.bool, "A mask should be a boolean tensor."
    assert mask.shape == shape, f"The mask has shape {list(mask.shape)}, not {list(shape)}."
    return mask


def a_network(rng, blocks=5, width=16):
    sizes = torch.logspace(-1.7, -0.5, blocks)[torch.randperm(blocks, generator=rng)]
    return [gaussian(width, width, rng=rng, scale=size) for size in sizes], gaussian(50, width, rng=rng)


# %% markdown magnitude
# ## 1 · 幅度遮罩 (Magnitude) · {points} 分 · 5 分鐘
#
# 整個矩陣一起比，絕對值最小的 `round(sparsity · n)` 個權重要走，n 是權重的個數。數目要剛剛好，一個都不能差，即使有很多權重一樣大。
#
# 期望：走的沒有一個比留的大。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 先攤平再 `argsort`，取前面的位置。用門檻比大小，在有相等的權重時，數目會不對。
#
# </details>


# %% solution magnitude
def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """True for the weights [out, in] that stay; round(sparsity · n) of all n go."""
    ### BEGIN SOLUTION
    order = weight.abs().flatten().argsort()
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[order[: round(sparsity * weight.numel())]] = False
    return mask.view_as(weight)
    ### END SOLUTION


# %% test magnitude
@worth(2)
def smallest_go(magnitude_mask, rng):
    """The smallest weights of the whole matrix go, whatever their sign."""
    weight = gaussian(6, 10, rng=rng) * torch.linspace(0.1, 3, 6)[:, None]
    for sparsity in (0.3, 0.7):
        mask = a_mask(magnitude_mask(weight, sparsity), weight.shape)
        assert mask.any() and not mask.all(), "Some should go and some should stay."
        assert weight[~mask].abs().max() <= weight[mask].abs().min(), (
            "A weight that goes is larger than one that stays."
        )


@worth(1, after=smallest_go)
def exactly_so_many(magnitude_mask, rng):
    """Exactly round(sparsity · n) go, also where all weights are equal."""
    for weight in (gaussian(5, 7, rng=rng), torch.full((5, 7), -0.5)):
        for sparsity in (0.0, 0.5, 0.9):
            mask = a_mask(magnitude_mask(weight, sparsity), weight.shape)
            assert (~mask).sum() == round(sparsity * 35), "The number of weights that go is not right."


try_out(STUDENT, [magnitude_mask], smallest_go, exactly_so_many)

# %% markdown wanda
# ## 2 · Wanda 的遮罩 (Wanda's mask) · {points} 分 · 10 分鐘
#
# 拿掉一個權重，輸出差多少？看權重，也看它乘上的激活值 (activation)：分數是 $|W_{ij}|\cdot\lVert X_j\rVert_2$。**每一列（每個輸出）自己比**，各拿掉分數最低的 `round(sparsity · in)` 個。`inputs` 是 [token, in]。
#
# 期望：通道大小不一時，輸出誤差不到幅度剪枝的 0.8 倍。消融：通道一樣大時，遮罩和「逐列的幅度剪枝」一模一樣。

# %% markdown
# <details><summary>💡 提示</summary>
#
# $\lVert X_j\rVert_2$ 是第 j 個輸入通道對所有 token 的平方和再開根號，形狀是 [in]。`scatter_` 可以一次把每列的幾個位置設成 False。
#
# </details>


# %% solution wanda
def wanda_mask(weight: Tensor, inputs: Tensor, sparsity: float) -> Tensor:
    """True for the weights [out, in] that stay; of each row round(sparsity · in) go. inputs [tokens, in]."""
    ### BEGIN SOLUTION
    scores = weight.abs() * inputs.norm(dim=0)
    removed = scores.argsort(dim=1)[:, : round(sparsity * weight.shape[1])]
    return torch.ones_like(weight, dtype=torch.bool).scatter_(1, removed, False)
    ### END SOLUTION


# %% test wanda
@worth(3)
def as_the_course_masks(wanda_mask, rng):
    """The mask is the course's own."""
    weight, inputs = gaussian(12, 40, rng=rng), correlated(100, 40, rng)
    for sparsity in (0.25, 0.6):
        mask = a_mask(wanda_mask(weight, inputs, sparsity), weight.shape)
        assert ((~mask).sum(1) == round(sparsity * 40)).all(), "Each row should lose the same number of weights."
        scores = pruning.wanda_scores(weight, inputs.norm(dim=0))
        same = (mask == pruning.keep_highest(scores, sparsity)).float().mean()
        assert same > 0.99, f"{1 - same:.0%} of the mask is another: look at the score."


@worth(1)
def beats_magnitude(wanda_mask, rng):
    """The output error is less than 0.8 times that of magnitude pruning."""
    weight, inputs = gaussian(32, 48, rng=rng), correlated(200, 48, rng)
    mask = a_mask(wanda_mask(weight, inputs, 0.5), weight.shape)
    assert (~mask).sum() == mask.numel() // 2, "Half of the weights should go."
    magnitude = weight.abs() > weight.abs().median()
    ratio = error_at_output(weight, weight * mask, inputs) / error_at_output(weight, weight * magnitude, inputs)
    assert ratio < 0.8, f"It is {ratio:.2f} times."
    return f"{ratio:.2f} times."


@worth(1, after=as_the_course_masks)
def equal_channels(wanda_mask, rng):
    """Ablation: where all channels are equally large, it is magnitude pruning row by row."""
    weight, inputs = gaussian(8, 20, rng=rng), gaussian(5, 1, rng=rng).expand(5, 20)
    mask = a_mask(wanda_mask(weight, inputs, 0.5), weight.shape)
    assert (mask == pruning.keep_highest(weight.abs(), 0.5)).all(), "It is not."


try_out(STUDENT, [wanda_mask], as_the_course_masks, beats_magnitude, equal_channels)

# %% markdown nm
# ## 3 · N:M 遮罩 (Semi-structured) · {points} 分 · 10 分鐘
#
# 硬體要的是有規律的零：沿輸入的方向，每 `m` 個連續的權重裡，留下分數最高的 `n` 個。
#
# 期望：每一組恰好留 n 個，而且是最好的 n 個。消融：同樣留一半，限制越緊，留下的分數總和越低（2:4 低於 4:8，4:8 低於不限位置）。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 把最後一維摺成 [out, in / m, m]，在最後一維上取 `topk`，再攤回去。
#
# </details>


# %% solution nm
def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """True for the n highest of every m consecutive scores of a row; scores [out, in], m divides in."""
    ### BEGIN SOLUTION
    groups = scores.reshape(len(scores), -1, m)
    kept = groups.topk(n, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).reshape(scores.shape)
    ### END SOLUTION


# %% test nm
@worth(2)
def best_of_every_group(nm_mask, rng):
    """Of every m consecutive inputs, the n with the highest scores stay."""
    scores = gaussian(5, 48, rng=rng).abs()
    for n, m in ((2, 4), (4, 8), (1, 4), (3, 16)):
        mask = a_mask(nm_mask(scores, n, m), scores.shape)
        assert (mask.unflatten(1, (-1, m)).sum(-1) == n).all(), f"Some group of {m} inputs does not keep {n}."
        best = pruning.keep_highest(scores.unflatten(1, (-1, m)), 1 - n / m).flatten(1)
        assert (mask == best).all(), f"Some group of {m} does not keep the {n} highest."


@worth(1, after=best_of_every_group)
def freedom_is_worth_something(nm_mask, rng):
    """Ablation: the tighter the pattern, the less of the scores stays."""
    scores = gaussian(64, 64, rng=rng).abs()
    kept = [scores[a_mask(nm_mask(scores, n, m), scores.shape)].sum().item() for n, m in ((2, 4), (4, 8), (32, 64))]
    assert kept[0] < kept[1] < kept[2], "It is not so."
    return f"2:4 keeps {kept[0] / kept[2]:.1%} of what rows of 64 keep."


try_out(STUDENT, [nm_mask], best_of_every_group, freedom_is_worth_something)

# %% markdown sparsegpt
# ## 4 · SparseGPT 的更新 (The update) · {points} 分 · 一個晚上
#
# 遮罩已經選好了。由左到右，每一欄把遮罩說要走的權重歸零，造成的誤差由右邊的欄補償（和 GPTQ 同一個迴圈，只是「捨入」換成「歸零」）。H 的對角線先加上阻尼 `damp` × 對角線的平均。傳回新的權重。
#
# 期望：走的權重恰好是 0；輸出誤差不到只歸零不補償的 0.85 倍；和課程的 `sparsegpt` 相同。消融：H 是對角矩陣時，留下的權重一個也不動。

# %% markdown
# <details><summary>💡 提示</summary>
#
# $H^{-1}=U^\top U$，U 是上三角（`torch.linalg.cholesky(..., upper=True)`）。第 i 欄：誤差是「這一欄**現在的值**減去歸零後的值」除以 $U_{ii}$，右邊的欄減去誤差乘 $U_{i,i+1:}$。右邊已經該是 0 的權重會被補償弄髒，輪到它們那一欄時才歸零。
#
# </details>


# %% solution sparsegpt
def sparsegpt(weight: Tensor, hessian: Tensor, mask: Tensor, damp: float = 0.01) -> Tensor:
    """New weights [out, in], 0 where the mask [out, in] is False; hessian [in, in]."""
    ### BEGIN SOLUTION
    work = weight.clone()
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    for i in range(weight.shape[1]):
        kept = work[:, i] * mask[:, i]
        error = (work[:, i] - kept) / factor[i, i]
        work[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
        work[:, i] = kept
    return work
    ### END SOLUTION


# %% test sparsegpt
def a_layer(rng, rows=16, columns=32):
    """Inputs, weights, H and Wanda's mask."""
    inputs, weight = correlated(300, columns, rng, share=4), gaussian(rows, columns, rng=rng)
    mask = pruning.keep_highest(pruning.wanda_scores(weight, inputs.norm(dim=0)), 0.5)
    return inputs, weight, 2 / len(inputs) * inputs.T @ inputs, mask


@worth(4)
def as_the_course_updates(sparsegpt, rng):
    """The weights are those of the course's own SparseGPT with this mask."""
    _, weight, matrix, mask = a_layer(rng)
    reference, _ = pruning.sparsegpt(weight, matrix, lambda _, columns: mask[:, columns])
    ask = "Is each column's error divided and passed on to all after it? Are damping and sign right?"
    close(sparsegpt(weight, matrix, mask), reference, "the weights", tolerance=1e-3, ask=ask)


@worth(2, after=as_the_course_updates)
def zeros_are_zero(sparsegpt, rng):
    """What goes is exactly zero; nothing else is."""
    _, weight, matrix, mask = a_layer(rng)
    found = sparsegpt(weight, matrix, mask)
    close(found, weight, "the weights", tolerance=math.inf)  # the shape alone
    assert (found[~mask] == 0).all(), "Some weight that should go is not zero."
    assert (found[mask] != 0).all(), "Some weight that should stay is zero."


@worth(3)
def pays(sparsegpt, rng):
    """The output error is less than 0.85 times that of the mask alone."""
    inputs, weight, matrix, mask = a_layer(rng, rows=64)
    found = sparsegpt(weight, matrix, mask)
    assert (found[~mask] == 0).all(), "Some weight that should go is not zero."
    ratio = error_at_output(weight, found, inputs) / error_at_output(weight, weight * mask, inputs)
    assert ratio < 0.85, f"It is {ratio:.2f} times."
    return f"{ratio:.2f} times."


@worth(1, after=as_the_course_updates)
def diagonal(sparsegpt, rng):
    """Ablation: with a diagonal H, what stays is not changed."""
    _, weight, matrix, mask = a_layer(rng)
    close(sparsegpt(weight, torch.diag(matrix.diagonal()), mask), weight * mask, "the weights")


try_out(STUDENT, [sparsegpt], as_the_course_updates, zeros_are_zero, pays, diagonal)

# %% markdown bitmask
# ## 5 · 位元遮罩 (Bitmask) · {points} 分 · 15 分鐘
#
# 零要讓檔案變小，就不能存零。存兩樣：每個權重一個位元的 `bitmask`（uint8，第 j 個位元組的第 i 個位元，由低到高，說第 8j + i 個權重是不是非零；最後不足八個補 0），以及依序排好的非零值。權重按列攤平。
#
# 期望：16 位元、稀疏度一半時，檔案是原來的 9/16。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 攤平，補到 8 的倍數，摺成 [n / 8, 8]，乘上 1、2、4、…、128 再相加。拆開時 `(bitmask[:, None] >> torch.arange(8)) & 1`，別忘了丟掉補上的。
#
# </details>


# %% solution bitmask
def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """bitmask uint8 [⌈n / 8⌉] and the values that are not zero [nonzeros] of a weight with n numbers."""
    ### BEGIN SOLUTION
    flat = weight.flatten()
    kept = flat != 0
    bits = torch.zeros(math.ceil(len(flat) / 8) * 8, dtype=torch.uint8)
    bits[: len(flat)] = kept
    places = 2 ** torch.arange(8)
    return (bits.reshape(-1, 8) * places).sum(1).to(torch.uint8), flat[kept]
    ### END SOLUTION


def unpack(bitmask: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    """The weight of this shape."""
    ### BEGIN SOLUTION
    bits = (bitmask[:, None] >> torch.arange(8)) & 1
    flat = torch.zeros(math.prod(shape), dtype=values.dtype)
    flat[bits.flatten()[: len(flat)].bool()] = values
    return flat.reshape(shape)
    ### END SOLUTION


# %% test bitmask
def sparse_weight(rng, *shape):
    weight = gaussian(*shape, rng=rng).bfloat16()
    return weight * (torch.rand(shape, generator=rng) < 0.5)


@worth(2)
def as_the_file_has_it(pack, unpack, rng):
    """Bitmask and values are those of the course's files, also where 8 does not divide the weights."""
    for shape in ((4, 16), (3, 7), (1, 5)):
        weight = sparse_weight(rng, *shape)
        reference = sparse_files.pack(weight)
        bitmask, values = pair(pack(weight), "pack")
        typed(bitmask, torch.uint8, "The bitmask")
        close(bitmask, reference["bitmask"], "bitmask", tolerance=0)
        close(values, reference["values"], "values", tolerance=0)


@worth(2)
def back_again(pack, unpack, rng):
    """Unpacking gives the weight, in its own shape and dtype."""
    for shape in ((4, 16), (3, 7), (2, 3)):
        weight = sparse_weight(rng, *shape)
        reference = sparse_files.pack(weight)
        found = unpack(reference["bitmask"], reference["values"], list(shape))
        typed(found, weight.dtype, "The weight")
        close(found, weight, "unpack", tolerance=0)


@worth(1, after=as_the_file_has_it)
def nine_sixteenths(pack, unpack, rng):
    """Half of the weights gone, a file of 16-bit numbers has 9/16 of the bytes."""
    weight = gaussian(32, 32, rng=rng).bfloat16()
    weight[:, ::2] = 0
    size = sum(tensor.nbytes for tensor in pair(pack(weight), "pack"))
    assert size / weight.nbytes == 9 / 16, f"It has {size / weight.nbytes:.4f}."


try_out(STUDENT, [pack, unpack], as_the_file_has_it, back_again, nine_sixteenths)

# %% markdown owl
# ## 6 · OWL：離群多的區塊剪少一點 (Fewer where outliers are) · {points} 分 · 20 分鐘
#
# 每個區塊給你它的 Wanda 分數（一個攤平的張量）。一個區塊的離群比例是：分數大於**自己的平均** `multiple` 倍的權重佔多少。密度（1 − 稀疏度）依離群比例線性地放在寬 2 · `span` 的區間裡：比例最低的區塊密度最低，最高的最高；各區塊一樣大，所有區塊稀疏度的平均要剛好是 `sparsity`。傳回每個區塊的稀疏度。
#
# 期望：最大與最小的稀疏度相差剛好 2 · span。消融：區塊都一樣時，OWL 就是平均分配，而且不能出現 NaN。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 先把比例縮放到 0 與 2 · span 之間，得到一條還沒對齊的密度；再整條平移，使平均是 1 − sparsity。比例都相同時，分母是 0，要擋住。
#
# </details>


# %% solution owl
def owl(scores: list[Tensor], sparsity: float, multiple: float, span: float) -> list[float]:
    """A sparsity for each block; scores: of each block, flat."""
    ### BEGIN SOLUTION
    ratios = torch.tensor([(s > multiple * s.mean()).double().mean() for s in scores], dtype=torch.float64)
    width = (ratios.max() - ratios.min()).clamp(min=1e-12)
    density = (ratios - ratios.min()) / width * 2 * span
    return (sparsity + density.mean() - density).tolist()
    ### END SOLUTION


# %% test owl
def some_blocks(rng, count=6, size=2000):
    """Scores of blocks with more and more outliers, shuffled and of different sizes; and the share of outliers."""
    blocks, shares = [], []
    for i in torch.randperm(count, generator=rng).tolist():
        scores = torch.rand(size, generator=rng)
        scores[: 10 * (i * i + 1)] = 20
        blocks.append(scores * (1 + i))
        shares.append(10 * (i * i + 1) / size)
    return blocks, shares


@worth(3)
def linear_in_outliers(owl, rng):
    """Sparsities fall linearly with the share of outliers, over an interval of 2 · span."""
    blocks, shares = some_blocks(rng)
    found = torch.tensor(owl(blocks, 0.6, 5.0, 0.08))
    wanted = linear_sparsities(shares, 0.6, 0.08) - 0.6
    close(found - found.mean(), wanted, "the sparsities around their mean", tolerance=1e-3)


@worth(2, after=linear_in_outliers)
def mean_is_kept(owl, rng):
    """The mean of all blocks is the sparsity asked for."""
    for sparsity, span in ((0.5, 0.1), (0.7, 0.2)):
        found = owl(some_blocks(rng)[0], sparsity, 5.0, span)
        assert isinstance(found, list) and len(found) == 6, "There should be a list with a sparsity for each block."
        close(torch.tensor(found).mean(), sparsity, "their mean")


@worth(1, after=linear_in_outliers)
def equal_blocks(owl, rng):
    """Ablation: equal blocks get equal sparsities."""
    scores = torch.rand(100, generator=rng)
    close(torch.tensor(owl([scores] * 4, 0.5, 5.0, 0.1)), torch.full((4,), 0.5), "the sparsities")


try_out(STUDENT, [owl], linear_in_outliers, mean_is_kept, equal_blocks)

# %% markdown sensitivity
# ## 7 · 敏感度：一次只剪一處 (Sensitivity) · {points} 分 · 15 分鐘
#
# 哪一個區塊碰不得？一次只剪**一個**區塊（用 `pruned(weight, sparsity)`，已經給你），其餘保持稠密，量最後輸出的相對平方誤差 $\lVert y'-y\rVert^2/\lVert y\rVert^2$。網路 `forward(weights, inputs)` 也給你了。
#
# 期望：前後區塊的順序換了，你的程式不用改。消融：稀疏度 0 時，每個區塊的敏感度都是 0。


# %% given
from common.course.exercises_given import pruned


def forward(weights: list[Tensor], inputs: Tensor) -> Tensor:
    """A small residual network: every block adds tanh(x Wᵀ) to x [tokens, features]."""
    x = inputs
    for weight in weights:
        x = x + torch.tanh(x @ weight.T)
    return x


# %% markdown
# <details><summary>💡 提示</summary>
#
# 每次都從原來的 `weights` 開始，做一個新的 list，只換掉第 i 個。基準只要算一次。
#
# </details>


# %% solution sensitivity
def sensitivity(weights: list[Tensor], inputs: Tensor, sparsity: float) -> list[float]:
    """Relative squared error at the output when only block i is pruned, for every i."""
    ### BEGIN SOLUTION
    dense, found = forward(weights, inputs), []
    for i, weight in enumerate(weights):
        changed = forward([*weights[:i], pruned(weight, sparsity), *weights[i + 1 :]], inputs)
        found.append(((changed - dense).square().sum() / dense.square().sum()).item())
    return found
    ### END SOLUTION


# %% test sensitivity
@worth(3)
def one_at_a_time(sensitivity, rng):
    """Each number is the error of pruning that block alone."""
    weights, inputs = a_network(rng)
    found = sensitivity(weights, inputs, 0.6)
    assert isinstance(found, list) and len(found) == 5, "There should be a list with a number for each block."
    for i, number in enumerate(found):
        wanted = pruning_error(forward, weights, inputs, [0.6 * (i == j) for j in range(5)])
        close(number, wanted, f"the number of block {i}", tolerance=1e-3)


@worth(1, after=one_at_a_time)
def nothing_pruned(sensitivity, rng):
    """Ablation: with a sparsity of 0 all are 0."""
    weights, inputs = a_network(rng)
    found = sensitivity(weights, inputs, 0.0)
    assert len(found) == 5 and max(map(abs, found)) < 1e-10, "They are not."
    assert max(sensitivity(weights, inputs, 0.5)) > 0, "With a sparsity of 0.5 they are 0 too."


try_out(STUDENT, [sensitivity], one_at_a_time, nothing_pruned)

# %% markdown structured
# ## 8 · 結構化的 OBS：拿掉一整個輸入 (Structured) · {points} 分 · 30 分鐘
#
# 這次整欄一起走，矩陣才真的變窄。給你 `weight` [out, in] 與 $H^{-1}$，選出拿掉之後（其餘的欄補償到最好）輸出誤差最小的輸入 j，傳回 j 與其餘各欄的新權重 [out, in − 1]。
#
# 期望：補償之後，沒有別的權重更好，也沒有別的輸入更該走；誤差不到「拿掉同一欄而不補償」的 0.95 倍。消融：拿掉代價最高的那一欄，誤差要大三倍以上。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 拿掉一個權重的代價是 $w_j^2/(2[H^{-1}]_{jj})$；整欄一起走，每個輸出各付一次。補償是從每一列減去 $H^{-1}$ 第 j 列的某個倍數：倍數要多少，第 j 欄才恰好變成 0？
#
# </details>


# %% solution structured
def remove_input(weight: Tensor, inverse: Tensor) -> tuple[int, Tensor]:
    """The input that costs least, and the weights [out, in - 1] of the others; inverse: H⁻¹ [in, in]."""
    ### BEGIN SOLUTION
    cost = weight.square().sum(0) / inverse.diagonal()
    j = cost.argmin().item()
    updated = weight - torch.outer(weight[:, j] / inverse[j, j], inverse[j])
    return j, torch.cat((updated[:, :j], updated[:, j + 1 :]), 1)
    ### END SOLUTION


# %% test structured
def a_wide_layer(rng, width=12):
    inputs = correlated(300, width, rng)
    weight = gaussian(8, width, rng=rng) * torch.linspace(0.5, 1.5, width)[torch.randperm(width, generator=rng)]
    return weight, (2 / len(inputs) * inputs.T @ inputs).double()


@worth(3)
def cheapest_goes(remove_input, rng):
    """The input that goes is the one whose loss costs least after compensation."""
    for _ in range(4):
        weight, matrix = a_wide_layer(rng)
        j, _ = pair(remove_input(weight, matrix.inverse().float()), "remove_input")
        assert isinstance(j, int) and 0 <= j < 12, "The first value should be the number of an input (int)."
        costs = [best_without(weight, matrix, i)[0] for i in range(12)]
        assert costs[j] <= 1.001 * min(costs), "Another input would have cost less."
        assert max(costs) > 3 * min(costs), "The ablation does no harm."


@worth(3)
def others_make_up_for_it(remove_input, rng):
    """The other weights are the best there are, and better than without compensation by at least a twentieth."""
    weight, matrix = a_wide_layer(rng)
    j, others = pair(remove_input(weight, matrix.inverse().float()), "remove_input")
    best, wanted = best_without(weight, matrix, j)
    wanted = torch.cat((wanted[:, :j], wanted[:, j + 1 :]), 1)
    close(others, wanted, "the weights of the others", tolerance=2e-3)
    alone = weight.double().clone()
    alone[:, j] = 0
    plain = (((alone - weight) @ matrix) * (alone - weight)).sum().item()
    assert best < 0.95 * plain, f"It is {best / plain:.2f} times."
    return f"{best / plain:.2f} times."


try_out(STUDENT, [remove_input], cheapest_goes, others_make_up_for_it)

# %% markdown metadata
# ## 9 · 2:4 的中繼資料 (2:4 metadata by hand) · {points} 分 · 30 分鐘
#
# GPU 的稀疏核心讀的是：每四個權重裡的兩個非零值，與它們的位置。寫出這個格式：`values` [out, in / 2] 是依序的非零值；每一組的兩個位置各 2 位元（前一個在低位），一組 4 位元，兩組裝進一個 uint8（前一組在低位），得到 `metadata` [out, in / 8]。給你的權重每四個恰好有兩個非零。
#
# 期望：16 位元時是原來的 9/16，和位元遮罩一樣大。為什麼硬體卻挑這個？（位置直接告訴乘法器要拿哪兩個輸入。）

# %% markdown
# <details><summary>💡 提示</summary>
#
# 摺成 [out, in / 4, 4]。`nonzero` 依列的順序列出位置，每組恰好兩個，所以可以直接 `view`。解開時，用 `scatter_` 把值放回位置。
#
# </details>


# %% solution metadata
def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """values [out, in / 2] and metadata uint8 [out, in / 8] of a weight [out, in] with 2 of every 4 not zero."""
    ### BEGIN SOLUTION
    rows = len(weight)
    groups = weight.reshape(rows, -1, 4)
    places = (groups != 0).nonzero()[:, -1].reshape(rows, -1, 2)
    values = groups.gather(-1, places).reshape(rows, -1)
    nibbles = (places[..., 0] | places[..., 1] << 2).reshape(rows, -1, 2)
    return values, (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8)
    ### END SOLUTION


def decompress(values: Tensor, metadata: Tensor) -> Tensor:
    """The weight [out, in]."""
    ### BEGIN SOLUTION
    rows = len(values)
    shifts = torch.tensor([0, 2, 4, 6])
    places = ((metadata[..., None].long() >> shifts) & 3).reshape(rows, -1, 2)
    groups = torch.zeros(rows, places.shape[1], 4, dtype=values.dtype)
    return groups.scatter_(-1, places, values.reshape(rows, -1, 2)).reshape(rows, -1)
    ### END SOLUTION


# %% test metadata
@worth(3)
def as_described(compress, decompress, rng):
    """Values and metadata are laid out as described."""
    weight, values, metadata = two_of_four(rng)
    found, codes = pair(compress(weight), "compress")
    typed(codes, torch.uint8, "The metadata")
    close(found, values, "values", tolerance=0)
    close(codes, metadata, "metadata", tolerance=0)


@worth(2)
def read_back(compress, decompress, rng):
    """Reading them gives the weight."""
    weight, values, metadata = two_of_four(rng)
    close(decompress(values, metadata.to(torch.uint8)), weight, "decompress", tolerance=0)


@worth(1, after=as_described)
def as_large_as_a_bitmask(compress, decompress, rng):
    """They take 9/16 of the bytes of 16-bit weights."""
    weight, _, _ = two_of_four(rng)
    size = sum(tensor.nbytes for tensor in pair(compress(weight), "compress"))
    assert size / weight.nbytes == 9 / 16, f"They take {size / weight.nbytes:.4f}."


try_out(STUDENT, [compress, decompress], as_described, read_back, as_large_as_a_bitmask)

# %% markdown plan
# ## 10 · 加分題：打敗平均分配 (Beat uniform at 70 %) · {points} 分 · 一個晚上
#
# 第 7 題的網路，要拿掉 70 % 的權重，各區塊一樣大。你來決定每個區塊剪多少：傳回每個區塊的稀疏度（0 到 1），平均不少於 `sparsity`。批改時用 `pruned` 照你的計畫剪，量最後輸出的誤差。
#
# 期望：誤差不到平均分配的 0.85 倍。消融：把你的計畫反過來（敏感的多剪），比平均分配還差。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 先量敏感度。最簡單的作法是 OWL 那樣線性地分；更好的是貪婪法：每次多剪一小步，挑讓輸出誤差增加最少的區塊。
#
# </details>


# %% solution plan
def plan(weights: list[Tensor], inputs: Tensor, sparsity: float) -> list[float]:
    """A sparsity for every block, with a mean of at least `sparsity`."""
    ### BEGIN SOLUTION
    dense, steps = forward(weights, inputs), 20
    taken = [0] * len(weights)

    def error(tried: list[int]) -> float:
        changed = forward([pruned(w, t / steps) for w, t in zip(weights, tried, strict=True)], inputs)
        return (changed - dense).square().sum().item()

    while sum(taken) < sparsity * steps * len(weights) - 1e-9:
        tries = [[t + (i == j) for i, t in enumerate(taken)] for j in range(len(weights)) if taken[j] < steps]
        taken = min(tries, key=error)
    return [t / steps for t in taken]
    ### END SOLUTION


# %% test plan
def a_plan(plan, rng):
    weights, inputs = a_network(rng)
    found = plan(weights, inputs, 0.7)
    assert isinstance(found, list) and len(found) == 5, "There should be a list with a sparsity for each block."
    assert all(0 <= s <= 1 for s in found), "A sparsity lies between 0 and 1."
    assert sum(found) / 5 >= 0.7 - 1e-6, f"The mean is {sum(found) / 5:.3f}: less than asked for is removed."
    return weights, inputs, found


@worth(4)
def beats_uniform(plan, rng):
    """The error is less than 0.85 times that of pruning all blocks alike."""
    weights, inputs, found = a_plan(plan, rng)
    ratio = pruning_error(forward, weights, inputs, found) / pruning_error(forward, weights, inputs, [0.7] * 5)
    assert ratio < 0.85, f"It is {ratio:.2f} times."
    return f"{ratio:.2f} times."


@worth(2, after=beats_uniform)
def turned_round(plan, rng):
    """Ablation: the same sparsities given to the wrong blocks do worse than pruning all alike."""
    weights, inputs, found = a_plan(plan, rng)
    order = sorted(range(5), key=found.__getitem__)
    wrong = dict(zip(order, reversed([found[i] for i in order]), strict=True))
    assert pruning_error(forward, weights, inputs, [wrong[i] for i in range(5)]) > pruning_error(
        forward, weights, inputs, [0.7] * 5
    ), "They do not."


try_out(STUDENT, [plan], beats_uniform, turned_round)

# %% markdown clinic
# ## 11 · 診所 (The clinic) · {points} 分 · 一個晚上
#
# 三種病人，每一種都可能其實沒病。`diagnose(patient)` 看一份紀錄，傳回病名；`mend(patient)` 傳回治好的量。傳進來的是 dict，`kind` 說是哪一科：
#
# - `"expert"`：混合專家模型裡的一個專家，`weight` [out, in]、校準時量到的 `norms` [in]、剪出來的 `mask`（Wanda，每列走的一樣多）。病名 `"uncalibrated"`：校準的文字從沒有走到這個專家，`norms` 全是 0，遮罩因此是任意的。治好的是遮罩：改用逐列的幅度剪枝，每列走的數目和原來一樣。
# - `"pruned"`：`weight` 與 `mask`。病名 `"refilled"`：剪完之後又做了量化，誤差補償把一些零填了回去。治好的是權重。
# - `"pattern"`：`scores` [out, in] 與一個說是 2:4 的 `mask`。病名 `"wrong axis"`：2:4 做在輸出的方向上，硬體要的是輸入的方向。治好的是正確的遮罩。
#
# 沒病的傳回 `"healthy"`，`mend` 則原樣傳回那個量。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 每一科只有一件事要看：`norms` 有沒有非零的；遮罩是 False 的地方權重是不是 0；遮罩沿輸入方向每四個是不是留兩個。
#
# </details>


# %% solution clinic
def diagnose(patient: dict) -> str:
    """ "uncalibrated", "refilled", "wrong axis" or "healthy"."""
    ### BEGIN SOLUTION
    if patient["kind"] == "expert":
        return "uncalibrated" if not patient["norms"].any() else "healthy"
    if patient["kind"] == "pruned":
        return "refilled" if patient["weight"][~patient["mask"]].any() else "healthy"
    groups = patient["mask"].reshape(len(patient["mask"]), -1, 4)
    return "healthy" if (groups.sum(-1) == 2).all() else "wrong axis"
    ### END SOLUTION


def mend(patient: dict) -> Tensor:
    """The mask or the weight as it should be."""
    ### BEGIN SOLUTION
    if patient["kind"] == "pruned":
        return patient["weight"] * patient["mask"]
    if diagnose(patient) == "healthy":
        return patient["mask"]
    if patient["kind"] == "pattern":
        return nm_mask(patient["scores"], 2, 4)
    kept = patient["mask"].sum(1)[0].item()
    best = patient["weight"].abs().topk(kept, dim=1).indices
    return torch.zeros_like(patient["mask"]).scatter_(1, best, True)
    ### END SOLUTION


# %% test clinic
@worth(3)
def experts(diagnose, mend, rng):
    """An expert that no text reached is found, and pruned by what is known of it."""
    for seen in (False, True):
        weight, norms = gaussian(6, 20, rng=rng), torch.rand(20, generator=rng) * seen
        norms[:3] = 0  # some channels are silent in healthy experts too
        patient = {"kind": "expert", "weight": weight, "norms": norms}
        patient["mask"] = pruning.keep_highest(weight.abs() * norms, 0.3)
        named = diagnose(patient) == ("healthy" if seen else "uncalibrated")
        assert named, f"With an expert that {'was' if seen else 'was never'} reached, diagnose gave the wrong name."
        wanted = patient["mask"] if seen else pruning.keep_highest(weight.abs(), 0.3)
        assert (a_mask(mend(patient), weight.shape) == wanted).all(), "The mended mask is not right."


@worth(3)
def zeros_that_came_back(diagnose, mend, rng):
    """Zeros that were refilled are found, however few, and are zero again."""
    for refilled in (1, 0, 20):
        weight = gaussian(6, 20, rng=rng)
        mask = pruning.keep_highest(weight.abs(), 0.5)
        bad = weight * mask
        places = (~mask).flatten().nonzero().flatten()
        bad.view(-1)[places[torch.randperm(len(places), generator=rng)[:refilled]]] = -0.01
        patient = {"kind": "pruned", "weight": bad, "mask": mask}
        named = diagnose(patient) == ("refilled" if refilled else "healthy")
        assert named, f"With {refilled} refilled zero(s), diagnose gave the wrong name."
        close(mend(patient), weight * mask, "the mended weight", tolerance=0)


@worth(3)
def patterns(diagnose, mend, rng):
    """A pattern along the outputs is found, and made along the inputs."""
    for ill in (True, False):
        scores = gaussian(16, 16, rng=rng).abs()
        right = pruning.keep_highest(scores.unflatten(1, (-1, 4)), 0.5).flatten(1)
        wrong = pruning.keep_highest(scores.T.unflatten(1, (-1, 4)), 0.5).flatten(1).T
        patient = {"kind": "pattern", "scores": scores, "mask": wrong if ill else right}
        named = diagnose(patient) == ("wrong axis" if ill else "healthy")
        assert named, f"With 2:4 along the {'outputs' if ill else 'inputs'}, diagnose gave the wrong name."
        assert (a_mask(mend(patient), scores.shape) == right).all(), "The mended mask is not right."


try_out(STUDENT, [diagnose, mend], experts, zeros_that_came_back, patterns)
