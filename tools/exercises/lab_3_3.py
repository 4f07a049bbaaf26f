"""Exercises of Lab 3.3, with solutions: see `tools.exercises.master` for the form of this file."""

# %% markdown
# # Lab 3.3 練習：親手寫出知識蒸餾 (Exercises)
#
# 共 {points} 分，十一題，由五分鐘到一個晚上，順序與 01 到 04 四個 notebook 大致相同。每題有四格：題目、摺起來的提示、要你寫的一格、測試。所有題目都在很小的張量上，不用網路，也不用 GPU。logits 一律是 [token, 詞彙量]，損失是對 token 的**平均**，單位是 nats。
#
# **規則**
#
# - 把 `raise NotImplementedError()` 換成你的程式。答案寫在原來那一格裡；不要刪除、複製、搬動題目原有的格子。其他格不會執行：輔助函式與 import 也要寫在答案那一格裡，`STUDENT` 那一格只能有一行。
# - 答案裡只能匯入 torch、numpy、math 這一類套件。從 `common` 匯入現成的答案不給分；題目說「不能用」的，用了整題不給分（測試格不查這一條，批改才查）。
# - 測試的輸入由 `STUDENT` 抽出，每個人不同；教師另有一組你看不到的輸入。訊息會說哪裡不對，不會說答案。
# - 後面的題目用到前面的函式時，批改用的是參考解答：同一個錯只扣一次分。
#
# 批改：`make grade LAB=3.3`，別處的檔案加 `FROM=路徑`。

# %% student
STUDENT = "your name or number"

# %% given
import math

import torch
from torch import Tensor

# %% checker
from torch.nn import functional as F

from common.course import exercises_3_3 as right
from common.course.exercises import close, pair, try_out, worth
from common.methods import distillation, head_loss, soft_labels


def gaussian(*shape, rng, scale=1.0):
    return torch.randn(*shape, generator=rng) * scale


def whole(*shape, rng, below):
    return torch.randint(0, below, shape, generator=rng)


def two_models(rng, tokens=20, vocabulary=50, scale=2.0):
    teacher = gaussian(tokens, vocabulary, rng=rng, scale=scale)
    return teacher + gaussian(tokens, vocabulary, rng=rng), teacher


# %% markdown blocks
# ## 1 · 該留哪些區塊 (Choose blocks) · {points} 分 · 15 分鐘
#
# 學生由教師的一部分區塊組成。一個區塊的影響力 (block influence) 是 $1-\cos(x,\,\text{block}(x))$ 對所有 token 的平均：它把隱藏狀態轉了多少。`hidden` 是 n + 1 個 [token, hidden]：第 i 個進入第 i 個區塊，第 i + 1 個從它出來。傳回影響力最大的 `keep` 個區塊的編號（int），**照模型裡的次序**，以及每個區塊的影響力。
#
# 期望：只放大、不轉向的區塊，影響力是 0。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 先對每個 token 算餘弦，再平均；不要先平均隱藏狀態。餘弦是內積除以兩個長度。
#
# </details>


# %% solution blocks
def choose_blocks(hidden: list[Tensor], keep: int) -> tuple[list[int], list[float]]:
    """The blocks to keep, in order, and the influence of every block; hidden: n + 1 tensors [tokens, hidden]."""
    ### BEGIN SOLUTION
    influence = []
    for before, after in zip(hidden[:-1], hidden[1:], strict=True):
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        influence.append((1 - cosine).mean().item())
    best = sorted(range(len(influence)), key=influence.__getitem__, reverse=True)[:keep]
    return sorted(best), influence
    ### END SOLUTION


# %% test blocks
def hidden_states(rng, blocks=7, tokens=30, width=16):
    """What enters and leaves blocks that turn their input by more or less, tokens of very different lengths."""
    hidden = [gaussian(tokens, width, rng=rng) * torch.logspace(-1, 1, tokens)[:, None]]
    for turn in torch.linspace(0.05, 2, blocks)[torch.randperm(blocks, generator=rng)]:
        length = hidden[-1].norm(dim=-1, keepdim=True)
        hidden.append(1.5 * hidden[-1] + turn * length * gaussian(tokens, width, rng=rng) / 4)
    return hidden


@worth(2)
def right_influence(choose_blocks, rng):
    """The influence is 1 - cos, averaged over tokens."""
    hidden = hidden_states(rng)
    _, influence = pair(choose_blocks(hidden, 3), "choose_blocks")
    close(torch.as_tensor(influence), right.influence_of_blocks(hidden), "the influences")


@worth(1, after=right_influence)
def right_blocks(choose_blocks, rng):
    """The most influential blocks are kept, in the model's order."""
    for keep in (1, 3, 5):
        kept, influence = pair(choose_blocks(hidden_states(rng), keep), "choose_blocks")
        whole_numbers = isinstance(kept, list) and all(isinstance(block, int) for block in kept)
        assert whole_numbers, "The first value should be a list with the numbers of blocks (int)."
        wanted = distillation.most_influential(influence, keep)
        assert sorted(kept) == sorted(wanted), f"For keep = {keep} other blocks are kept."
        assert kept == wanted, "The right blocks, but not in the model's order."


@worth(1, after=right_influence)
def longer_is_not_turned(choose_blocks, rng):
    """Ablation: a block that only makes its input longer has no influence."""
    x = gaussian(10, 8, rng=rng)
    _, influence = pair(choose_blocks([x, 3 * x, -x], 1), "choose_blocks")
    close(torch.as_tensor(influence), torch.tensor([0.0, 2.0]), "the influences")


try_out(STUDENT, [choose_blocks], right_influence, right_blocks, longer_is_not_turned)

# %% markdown leak
# ## 2 · 找出洩漏 (Spot the leak) · {points} 分 · 20 分鐘
#
# 訓練與測試的視窗不該共用文字，可是同一篇文章可能收了兩次、只差幾個 token。給你 `train`、`test`（各是 [windows, seqlen] 的 token），傳回「有連續 `n` 個 token 也出現在某個訓練視窗裡」的測試視窗編號，由小到大。
#
# 期望：洩漏的位置不必對齊，所以只比整個視窗抓不到。消融：`n` = 1 時幾乎每個視窗都算洩漏，這樣的標準沒有用。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 把訓練視窗裡所有長度 n 的片段做成一個 set（`tuple(...)` 可以放進 set），再看測試視窗的片段在不在裡面。片段不跨視窗。
#
# </details>


# %% solution leak
def leaks(train: Tensor, test: Tensor, n: int) -> list[int]:
    """Numbers of the test windows that share n tokens in a row with some training window."""

    ### BEGIN SOLUTION
    def pieces(window: list[int]) -> set[tuple[int, ...]]:
        return {tuple(window[i : i + n]) for i in range(len(window) - n + 1)}

    seen = set().union(*map(pieces, train.tolist()))
    return [number for number, window in enumerate(test.tolist()) if pieces(window) & seen]
    ### END SOLUTION


# %% test leak
def two_splits(rng, copied=8):
    """Windows of random tokens, and test windows into which pieces of training windows were copied."""
    train, test = (whole(12, 40, rng=rng, below=500) for _ in range(2))
    ill = sorted(torch.randperm(12, generator=rng)[:4].tolist())
    for window in ill:
        source, start, at = (int(whole(1, rng=rng, below=k)) for k in (12, 33 - copied, 33 - copied))
        start, at = (40 - copied if window == end else place for end, place in ((ill[0], start), (ill[1], at)))
        test[window, at : at + copied] = train[source, start : start + copied]
    return train, test, ill


@worth(3)
def found_wherever_they_are(leaks, rng):
    """Every window into which training text was copied is found, and no other."""
    for copied in (8, 12):
        train, test, ill = two_splits(rng, copied)
        found = leaks(train, test, 8)
        assert isinstance(found, list), "There should be a list of numbers."
        assert found == ill, f"{len(set(ill) - set(found))} missed, {len(set(found) - set(ill))} accused wrongly."


@worth(1, after=found_wherever_they_are)
def shorter_pieces_are_no_leak(leaks, rng):
    """Pieces shorter than n are no leak, and pieces do not reach over the end of a window."""
    train, test, _ = two_splits(rng, 8)
    assert leaks(train, test, 10) == [], "Eight tokens were taken for ten."
    both = torch.arange(40)
    assert leaks(torch.stack((both[:20], both[20:])), both[15:25][None], 8) == [], (
        "A piece reached into the next window."
    )


@worth(1, after=found_wherever_they_are)
def one_token(leaks, rng):
    """Ablation: with n = 1 more than half of all windows leak."""
    train, test, _ = two_splits(rng)
    assert len(leaks(train, test, 1)) > 6, "They do not."


try_out(STUDENT, [leaks], found_wherever_they_are, shorter_pieces_are_no_leak, one_token)

# %% markdown topk
# ## 3 · 軟標籤：前 k 名與尾巴 (Top-k and tail) · {points} 分 · 20 分鐘
#
# 教師的分布太大，存不下，所以只存機率最高的 k 個 token，**以及其餘所有 token 合起來的機率**（尾巴，tail）。寫兩個函式：`top_k`（傳回 ids [token, k] 與 log 機率 [token, k + 1]，溫度是 1），以及學生對這 k + 1 個結果的 $\mathrm{KL}(\text{teacher}\Vert\text{student})$，對 token 平均。不能用：{without}。
#
# 期望：k 越大，KL 越接近完整的 KL，而且永遠不超過它。消融：丟掉尾巴、把前 k 個重新正規化，學生與教師一樣時 KL 仍是 0，但學生把尾巴學成 0 也看不出來。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 尾巴的 log 機率用 `logsumexp`：先把前 k 個填成 −inf。不要用 1 減去前 k 個的和，尾巴很小的時候會變成 0 或負數。
#
# </details>


# %% solution topk without=kl_div
def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """ids [tokens, k] of the likeliest tokens, and log-probabilities [tokens, k + 1]: theirs, then that of all others."""
    ### BEGIN SOLUTION
    log_p = logits.log_softmax(-1)
    values, ids = log_p.topk(k, dim=-1)
    other = log_p.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return ids, torch.cat((values, other), -1)
    ### END SOLUTION


def top_k_kl(student_logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """Mean over tokens of the KL divergence between the teacher's and the student's k + 1 outcomes."""
    ### BEGIN SOLUTION
    log_q = student_logits.log_softmax(-1)
    other = log_q.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    outcomes = torch.cat((log_q.gather(-1, ids), other), -1)
    return (log_probs.exp() * (log_probs - outcomes)).sum(-1).mean()
    ### END SOLUTION


# %% test topk
@worth(2)
def what_is_stored(top_k, top_k_kl, rng):
    """The k likeliest tokens with their log-probabilities, and the rest of the probability."""
    _, teacher = two_models(rng)
    for k in (1, 5):
        ids, log_probs = pair(top_k(teacher, k), "top_k")
        wanted_ids, wanted = soft_labels.top_k_and_tail(teacher, k, 1.0)
        close(ids, wanted_ids, "ids", tolerance=0)
        close(log_probs, wanted, "log-probabilities")


@worth(1)
def a_tiny_tail(top_k, top_k_kl, rng):
    """The tail is right also where it is far too small to be found by subtracting."""
    logits = gaussian(6, 30, rng=rng)
    logits[:, 3] += 40
    _, log_probs = pair(top_k(logits, 1), "top_k")
    close(log_probs, soft_labels.top_k_and_tail(logits, 1, 1.0)[1], "log-probabilities")


@worth(2)
def its_divergence(top_k, top_k_kl, rng):
    """The divergence is that of k + 1 outcomes, and sees a student without a tail."""
    student, teacher = two_models(rng)
    ids, log_probs = soft_labels.top_k_and_tail(teacher, 4, 1.0)
    wanted = distillation.top_k_kd_loss(student, ids, log_probs, 1.0) / len(student)
    close(top_k_kl(student, ids, log_probs), wanted, "the divergence")
    tailless = torch.full_like(teacher, -20.0).scatter(-1, ids, teacher.gather(-1, ids))
    assert top_k_kl(tailless, ids, log_probs) > 0.1, "Ablation: a student without a tail should not get off so lightly."


@worth(1)
def grows_with_k(top_k, top_k_kl, rng):
    """With a larger k the divergence grows towards that of the whole distributions."""
    student, teacher = two_models(rng)
    kl = [float(top_k_kl(student, *soft_labels.top_k_and_tail(teacher, k, 1.0))) for k in (1, 4, 16, 49)]
    full = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean").item()
    assert kl == sorted(kl), "It does not grow."
    assert kl[0] < 0.9 * full and abs(kl[-1] - full) < 1e-3 * full, "It does not reach the whole divergence."
    return f"k = 1: {kl[0] / full:.0%} of it, k = 16: {kl[2] / full:.0%}."


try_out(STUDENT, [top_k, top_k_kl], what_is_stored, a_tiny_tail, its_divergence, grows_with_k)

# %% markdown ce
# ## 4 · 由 logits 算交叉熵 (Cross-entropy) · {points} 分 · 10 分鐘
#
# 位置 t 的 logits 預測的是 token t + 1。給你一批 `logits` [batch, seqlen, 詞彙量]、`ids` [batch, seqlen]，以及 `real` [batch, seqlen]（補齊用的位置是 False），算出每個**真正的**下一個 token 的平均交叉熵。不能用：{without}。
#
# 期望：均勻的 logits 得到 ln(詞彙量)；logits 加上常數、或大到 10000，結果都不出錯。消融：把補齊的位置也算進去，損失是正確值的 1.5 倍以上（測試裡補的都是難猜的 token）。

# %% markdown
# <details><summary>💡 提示</summary>
#
# $-\log q_y=\operatorname{logsumexp}(z)-z_y$。logits 去掉最後一個位置，ids 與 real 去掉第一個。除以真正算到的 token 個數。
#
# </details>


# %% solution ce without=cross_entropy,nll_loss,CrossEntropyLoss,NLLLoss
def next_token_loss(logits: Tensor, ids: Tensor, real: Tensor) -> Tensor:
    """Mean cross-entropy of the next tokens that are real; logits [batch, seqlen, vocabulary]; ids, real [batch, seqlen]."""
    ### BEGIN SOLUTION
    logits, answers, real = logits[:, :-1], ids[:, 1:], real[:, 1:]
    loss = logits.logsumexp(-1) - logits.gather(-1, answers[..., None]).squeeze(-1)
    return loss[real].mean()
    ### END SOLUTION


# %% test ce
def a_batch(rng, vocabulary=11):
    """Logits, tokens and which of them are real, rows of different lengths."""
    logits, ids = gaussian(4, 9, vocabulary, rng=rng, scale=3), whole(4, 9, rng=rng, below=vocabulary)
    real = torch.arange(9) < torch.tensor([9, 5, 3, 7])[:, None]
    likely, unlikely = (choice(-1).roll(1, dims=1) for choice in (logits.argmax, logits.argmin))
    ids = torch.where(torch.rand(4, 9, generator=rng) < 0.7, likely, ids)
    return logits, torch.where(real, ids, unlikely), real  # padding is hard to predict: to count it must show


@worth(3)
def right_loss(next_token_loss, rng):
    """The loss is that of the next real token, averaged over these."""
    logits, ids, real = a_batch(rng)
    everything = torch.ones_like(real)
    close(
        next_token_loss(logits, ids, everything),
        right.next_token_loss(logits, ids, everything),
        "the loss without padding",
    )
    found, wanted = next_token_loss(logits, ids, real), right.next_token_loss(logits, ids, real)
    close(found, wanted, "the loss with padding")
    assert right.next_token_loss(logits, ids, everything) > 1.5 * wanted, "The ablation does no harm."


@worth(1, after=right_loss)
def padding_does_not_matter(next_token_loss, rng):
    """What stands in padding does not matter."""
    logits, ids, real = a_batch(rng)
    other = torch.where(real, ids, whole(4, 9, rng=rng, below=11))
    close(next_token_loss(logits, other, real), next_token_loss(logits, ids, real), "the loss")


@worth(1, after=right_loss)
def large_logits(next_token_loss, rng):
    """Uniform logits give the logarithm of the vocabulary; logits of ten thousand give no NaN."""
    logits, ids, real = a_batch(rng)
    close(next_token_loss(torch.zeros_like(logits), ids, real), math.log(11), "the loss of uniform logits")
    close(
        next_token_loss(1e4 + logits, ids, real), right.next_token_loss(logits, ids, real), "the loss", tolerance=2e-3
    )


try_out(STUDENT, [next_token_loss], right_loss, padding_does_not_matter, large_logits)

# %% markdown kd
# ## 5 · 蒸餾損失與 T² (The distillation loss) · {points} 分 · 15 分鐘
#
# $\alpha\cdot\text{CE}+(1-\alpha)\cdot T^2\cdot\mathrm{KL}(p_T\Vert q_T)$，p 是教師、q 是學生，下標 T 是 logits 除以溫度 (temperature)，兩項都對 token 平均。`labels` [token] 是硬標籤 (hard labels)，CE 不除以溫度。不能用：{without}。
#
# 期望：有 T² 時，溫度由 4 加到 8，梯度的大小變化不到兩成。消融：沒有 T²，梯度小了三倍以上。

# %% markdown
# <details><summary>💡 提示</summary>
#
# KL 的方向：以**教師**的機率加權，$\sum_i p_i(\log p_i-\log q_i)$。兩邊都用 `log_softmax`，不要先 softmax 再取 log。
#
# </details>


# %% solution kd without=kl_div,KLDivLoss,cross_entropy,nll_loss,CrossEntropyLoss,NLLLoss
def kd_loss(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float) -> Tensor:
    """α · CE + (1 - α) · T² · KL, means over tokens; student and teacher: logits [tokens, vocabulary]."""
    ### BEGIN SOLUTION
    hard = -student.log_softmax(-1).gather(-1, labels[:, None]).mean()
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in (student, teacher))
    soft = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return alpha * hard + (1 - alpha) * temperature**2 * soft
    ### END SOLUTION


# %% test kd
def reference_kd(student, teacher, labels, alpha, temperature):
    hard = F.cross_entropy(student, labels)
    soft = distillation.kd_loss(student, teacher, temperature) / len(student)
    return distillation.distillation_loss(hard, soft, alpha)


@worth(2)
def right_terms(kd_loss, rng):
    """Both terms are right, alone."""
    student, teacher = two_models(rng)
    labels = whole(20, rng=rng, below=50)
    for alpha, temperature in ((1.0, 3.0), (0.0, 1.0), (0.0, 3.0)):
        found = kd_loss(student, teacher, labels, alpha, temperature)
        wanted = reference_kd(student, teacher, labels, alpha, temperature)
        close(found, wanted, f"the loss at α = {alpha:g} and T = {temperature:g}")


@worth(1)
def right_mixture(kd_loss, rng):
    """They are mixed as α says."""
    student, teacher = two_models(rng)
    labels = whole(20, rng=rng, below=50)
    close(kd_loss(student, teacher, labels, 0.3, 2.0), reference_kd(student, teacher, labels, 0.3, 2.0), "the loss")


@worth(1)
def gradients_keep_their_size(kd_loss, rng):
    """From T = 4 to 8 gradients change by less than a fifth; without T² they would shrink to less than a third."""
    student, teacher = two_models(rng, scale=1.0)
    labels, sizes, step = whole(20, rng=rng, below=50), [], 1e-2
    direction = head_loss.kd_and_gradient(student, teacher, 4.0)[1]
    direction = (direction / direction.norm()).double()
    for t in (4.0, 8.0):
        up, down = (
            kd_loss(student.double() + sign * step * direction, teacher.double(), labels, 0.0, t) for sign in (1, -1)
        )
        sizes.append((float(up) - float(down)) / (2 * step))
    ratio = sizes[1] / sizes[0]
    assert 0.8 < ratio < 1.2, f"They change to {ratio:.2f} times."
    assert ratio / 4 < 1 / 3, "The ablation does no harm."
    return f"{ratio:.2f} times; without T² {ratio / 4:.2f} times."


@worth(1, after=right_terms)
def same_model(kd_loss, rng):
    """A student that is its teacher has no divergence, and shifted or huge logits do no harm."""
    student, teacher = two_models(rng)
    labels = whole(20, rng=rng, below=50)
    assert abs(float(kd_loss(teacher, teacher + 5, labels, 0.0, 2.0))) < 1e-5, "It has one."
    assert math.isfinite(kd_loss(500 * student, 500 * teacher, labels, 0.5, 1.0)), "Huge logits give NaN or inf."


try_out(STUDENT, [kd_loss], right_terms, right_mixture, gradients_keep_their_size, same_model)

# %% markdown gradient
# ## 6 · 寫出梯度 (The exact gradient) · {points} 分 · 20 分鐘
#
# $T^2\cdot\mathrm{KL}(p_T\Vert q_T)$（對 token 平均）對學生 logits 的梯度有一行的公式。推導它、寫出來，不要用 autograd。不能用：{without}。
#
# 期望：和 autograd 在 float64 下完全一致；每一列加起來是 0。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 對 logits 微分時，$p$ 是常數，只剩 $-\sum_i p_i\log q_i$；而 $\partial\log q_i/\partial u_j=\delta_{ij}-q_j$，$u=z/T$。最後想想：$T^2$、$1/T$ 與平均各留下什麼？
#
# </details>


# %% solution gradient without=backward,grad,autograd
def kd_gradient(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Gradient [tokens, vocabulary] of the mean over tokens of T² · KL, in the student's logits."""
    ### BEGIN SOLUTION
    q, p = ((z / temperature).softmax(-1) for z in (student, teacher))
    return temperature * (q - p) / len(student)
    ### END SOLUTION


# %% test gradient
@worth(3)
def as_autograd(kd_gradient, rng):
    """The gradient is that of autograd, at every temperature."""
    for temperature in (1.0, 2.0, 5.0):
        student, teacher = (z.double() for z in two_models(rng))
        student.requires_grad_(True)
        (distillation.kd_loss(student, teacher, temperature) / len(student)).backward()
        close(kd_gradient(student.detach(), teacher, temperature), student.grad, f"the gradient at T = {temperature:g}")


@worth(1, after=as_autograd)
def sums_to_zero(kd_gradient, rng):
    """A constant added to the logits changes nothing: every row sums to 0, and is not 0 itself."""
    student, teacher = two_models(rng)
    found = kd_gradient(student, teacher, 2.0)
    close(found, student, "the gradient", tolerance=math.inf)  # the shape alone
    assert found.sum(-1).abs().max() < 1e-5 < found.abs().max(), "The rows do not sum to 0, or all is 0."


@worth(1, after=as_autograd)
def nothing_to_learn(kd_gradient, rng):
    """Ablation: a student that is its teacher has no gradient."""
    _, teacher = two_models(rng)
    found = kd_gradient(teacher, teacher.clone(), 3.0)
    close(found, teacher, "the gradient", tolerance=math.inf)  # the shape alone
    assert found.abs().max() < 1e-6, "It has one."


try_out(STUDENT, [kd_gradient], as_autograd, sums_to_zero, nothing_to_learn)

# %% markdown relation
# ## 7 · MiniLM 的值關係 (Value relations) · {points} 分 · 20 分鐘
#
# 學生比教師窄，隱藏狀態不能直接相減；但「哪個 token 像哪個 token」可以比。一個頭 (head) 的值關係是 $\mathrm{softmax}(VV^\top/\sqrt{d})$，d 是這個頭的寬度。傳回 $\mathrm{KL}(\text{teacher}\Vert\text{student})$，對頭與列平均。V 是 [heads, seqlen, d]，兩邊的 d 可以不同。不能用：{without}。
#
# 期望：不管兩邊多寬都算得出來；教師自己對自己是 0；V 整個旋轉，關係不變。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 兩邊各除以**自己的** $\sqrt d$。KL 對最後一維求和，其餘平均。
#
# </details>


# %% solution relation without=kl_div
def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL divergence of value relations; student, teacher: values [heads, seqlen, d], each with its own d."""
    ### BEGIN SOLUTION
    log_q, log_p = ((v @ v.mT / math.sqrt(v.shape[-1])).log_softmax(-1) for v in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    ### END SOLUTION


# %% test relation
@worth(3)
def right_divergence(relation_loss, rng):
    """The divergence is right, for students as wide as the teacher and narrower."""
    for width in (16, 8, 4):
        student, teacher = gaussian(3, 10, width, rng=rng), gaussian(3, 10, 16, rng=rng)
        close(relation_loss(student, teacher), right.relation_loss(student, teacher), f"the loss at width {width}")


@worth(1, after=right_divergence)
def turned(relation_loss, rng):
    """Turning all values changes no relation; other values do."""
    teacher = gaussian(2, 8, 12, rng=rng)
    turn = torch.linalg.qr(gaussian(12, 12, rng=rng)).Q
    assert abs(float(relation_loss(teacher @ turn, teacher))) < 1e-4, "Turned values should have no divergence."
    assert float(relation_loss(2 * teacher, teacher)) > 1e-2, "Ablation: values twice as long should have some."


try_out(STUDENT, [relation_loss], right_divergence, turned)

# %% markdown train
# ## 8 · 訓練迴圈 (A training loop) · {points} 分 · 30 分鐘
#
# 學生是一個線性層：logits = `inputs` @ W.T。給你教師的 logits、起始的 W 與每一步要看的列（`batches`：一步一個索引張量），用 SGD（學習率 `lr`，沒有動量）最小化每一批的 $\mathrm{KL}(\text{teacher}\Vert\text{student})$ 平均，溫度 1。傳回訓練後的 W，以及**每一步更新之前**那一批的損失。可以用 autograd，也可以用第 6 題的公式；更新那一行自己寫。不能用：{without}。
#
# 期望：最後的損失不到開始的十分之一。消融：教師的 logits 打亂之後（配錯題目），損失降不到一半。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 梯度對 W 是 $g^\top X$，g 是 logits 的梯度。用 autograd 時每一步都要把舊的梯度清掉，更新要在 `torch.no_grad()` 裡。
#
# </details>


# %% solution train without=kl_div,optim,SGD
def distil(
    inputs: Tensor, teacher: Tensor, weight: Tensor, batches: list[Tensor], lr: float
) -> tuple[Tensor, list[float]]:
    """The trained weight [vocabulary, features], and each step's loss; inputs [n, features], teacher [n, vocabulary]."""
    ### BEGIN SOLUTION
    weight, losses = weight.clone(), []
    for rows in batches:
        x, log_p = inputs[rows], teacher[rows].log_softmax(-1)
        log_q = (x @ weight.T).log_softmax(-1)
        losses.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
        gradient = (log_q.exp() - log_p.exp()) / len(rows)
        weight -= lr * gradient.T @ x
    return weight, losses
    ### END SOLUTION


# %% test train
def a_lesson(rng, n=60, features=8, vocabulary=12, steps=80):
    inputs = gaussian(n, features, rng=rng)
    teacher = inputs @ gaussian(vocabulary, features, rng=rng).T
    batches = [torch.randperm(n, generator=rng)[:size] for size in (20, 35) * (steps // 2)]
    return inputs, teacher, 0.1 * gaussian(vocabulary, features, rng=rng), batches


@worth(4)
def step_by_step(distil, rng):
    """Every step is that of SGD: the losses, and the weight after three steps."""
    inputs, teacher, weight, batches = a_lesson(rng)
    found, losses = pair(distil(inputs, teacher, weight, batches[:3], 0.5), "distil")
    wanted, expected = right.training(inputs, teacher, weight, batches[:3], 0.5)
    close(torch.tensor(losses), torch.tensor(expected), "the losses before each step", tolerance=1e-3)
    close(found, wanted, "the weight after three steps", tolerance=1e-3)


@worth(2)
def learns(distil, rng):
    """The loss falls to less than a tenth."""
    _, losses = pair(distil(*a_lesson(rng), 1.0), "distil")
    assert len(losses) == 80, "There should be a loss for each step."
    assert losses[-1] < losses[0] / 10, f"It falls to {losses[-1] / losses[0]:.2f} times."
    return f"From {losses[0]:.2f} to {losses[-1]:.3f} nats."


@worth(1, after=step_by_step)
def wrong_answers(distil, rng):
    """Ablation: with answers that belong to other questions the loss does not fall to a half."""
    inputs, teacher, weight, batches = a_lesson(rng)
    _, losses = pair(distil(inputs, teacher[torch.randperm(60, generator=rng)], weight, batches, 0.3), "distil")
    assert sum(losses[-10:]) > 0.5 * sum(losses[:2]) * 5, "It does: where does the student learn that from?"


try_out(STUDENT, [distil], step_by_step, learns, wrong_answers)

# %% markdown compare
# ## 9 · 兩個學生誰好？成對地比 (Paired comparison) · {points} 分 · 15 分鐘
#
# 兩個學生在**相同的視窗**上各有每個視窗的平均 NLL（`a`、`b`，[視窗]，每個視窗一樣長）。傳回三個數：兩個困惑度之比 $\mathrm{ppl}_a/\mathrm{ppl}_b$，以及它的 95 % 信賴區間的下端與上端（常態近似：成對差的平均 ± 1.96 個標準誤，再取 exp）。
#
# 期望：視窗難易差很多時，成對的區間比不成對的窄十倍以上，能看出 1 % 的差別。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 困惑度之比的對數是 NLL 之差的平均。標準誤是差的標準差（除以 n − 1 的那種）除以 $\sqrt n$。
#
# </details>


# %% solution compare
def compare(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Ratio of the perplexities of a and b, and the ends of its 95 % confidence interval; a, b: NLL of each window."""
    ### BEGIN SOLUTION
    difference = a - b
    mean, error = difference.mean().item(), difference.std().item() / math.sqrt(len(a))
    return tuple(math.exp(mean + z * error) for z in (0, -1.96, 1.96))
    ### END SOLUTION


# %% test compare
def two_students(rng, n=48, apart=0.01):
    hard = 2.5 + gaussian(n, rng=rng, scale=0.6)
    return hard + apart + gaussian(n, rng=rng, scale=0.01), hard


@worth(2)
def right_numbers(compare, rng):
    """The ratio and its interval are right."""
    a, b = two_students(rng)
    a, b = a.double(), b.double()
    found = pair(compare(a, b), "compare", 3)
    ratio, ends = right.ratio_and_interval(a, b)
    close(found[0], ratio, "the ratio")
    close(torch.tensor(found[1:]), ends, "the interval", tolerance=1e-5)


@worth(1, after=right_numbers)
def sees_a_percent(compare, rng):
    """Paired, a difference of one percent is seen; unpaired it would drown."""
    a, b = two_students(rng)
    ratio, low, high = pair(compare(a, b), "compare", 3)
    assert 1 < low < ratio < high, "The interval should lie above 1, around the ratio."
    unpaired = 2 * 1.96 * math.sqrt((a.var() + b.var()) / 48)
    assert unpaired > 10 * (high - low), "Ablation: the unpaired interval is not ten times as wide."
    return f"{ratio:.3f}, between {low:.3f} and {high:.3f}."


try_out(STUDENT, [compare], right_numbers, sees_a_percent)

# %% markdown policy
# ## 10 · 加分題：學生自己寫的一批 (On-policy batch) · {points} 分 · 30 分鐘
#
# 學生在自己寫的文字上學，才學得到怎麼收拾自己的錯。這裡的模型只看前一個 token：`student`、`teacher` 是 [vocabulary, vocabulary] 的 logits，第 i 列是 token i 之後的分布。由 `start` [batch] 開始，**由學生**抽樣 `length` 個 token（用給你的亂數 `noise`），再算這些位置的反向 KL $\mathrm{KL}(q_{\text{student}}\Vert p_{\text{teacher}})$ 平均。傳回抽到的 token [batch, length] 與這個 KL。不能用：{without}。
#
# 抽樣規則：`noise` [batch, length] 在 0 與 1 之間，選第一個「累積機率大於 noise」的 token。期望：同樣的 noise 得到同樣的 token，頻率符合學生的分布。

# %% markdown
# <details><summary>💡 提示</summary>
#
# `cumsum` 之後，`(累積 <= noise).sum(-1)` 就是那個 token（浮點捨入可能超出最後一個，要 clamp）。反向 KL 以學生的機率加權。位置 t 的分布由 t − 1 的 token 決定，第一個由 `start` 決定。
#
# </details>


# %% solution policy without=kl_div,multinomial
def on_policy(student: Tensor, teacher: Tensor, start: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [batch, length] that the student writes after start [batch], and the mean reverse KL at their positions."""
    ### BEGIN SOLUTION
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    before, written, divergences = start, [], []
    for draw in noise.T:
        divergences.append((log_q[before].exp() * (log_q[before] - log_p[before])).sum(-1))
        cumulative = log_q[before].exp().cumsum(-1)
        before = (cumulative <= draw[:, None]).sum(-1).clamp(max=len(student) - 1)
        written.append(before)
    return torch.stack(written, 1), torch.stack(divergences).mean()
    ### END SOLUTION


# %% test policy
def two_bigrams(rng, vocabulary=7):
    student = gaussian(vocabulary, vocabulary, rng=rng, scale=1.5)
    return student, 3 * student + gaussian(vocabulary, vocabulary, rng=rng)  # a teacher that is surer of itself


@worth(3)
def writes_as_the_student(on_policy, rng):
    """Tokens follow the student's own distribution, each given the one before."""
    student, teacher = two_bigrams(rng)
    start, noise = whole(300, rng=rng, below=7), torch.rand(300, 20, generator=rng)
    tokens, _ = pair(on_policy(student, teacher, start, noise), "on_policy")
    close(tokens, torch.zeros(300, 20), "tokens", tolerance=math.inf)  # the shape alone
    before = torch.cat((start[:, None], tokens[:, :-1]), 1)
    same = (tokens == right.drawn(student, before.long(), noise)).float().mean()
    assert same > 0.999, "The tokens are not those that the rule draws from the student."


@worth(3)
def reverse_divergence(on_policy, rng):
    """The divergence is the reverse one, at the positions that the student visited."""
    student, teacher = two_bigrams(rng)
    start, noise = whole(20, rng=rng, below=7), torch.rand(20, 5, generator=rng)
    tokens, found = pair(on_policy(student, teacher, start, noise), "on_policy")
    before = torch.cat((start[:, None], tokens[:, :-1].long()), 1).flatten()
    wanted, forward = (
        right.divergence(student[before], teacher[before]),
        right.divergence(teacher[before], student[before]),
    )
    close(found, wanted, "the divergence", tolerance=1e-3)
    assert abs(forward - wanted) > 1e-2 * wanted, "Ablation: the forward divergence is the same here."


try_out(STUDENT, [on_policy], writes_as_the_student, reverse_divergence)

# %% markdown clinic
# ## 11 · 診所 (The clinic) · {points} 分 · 一個晚上
#
# 三種病人，每一種都可能其實沒病。`diagnose(patient)` 看一份紀錄，傳回病名；`mend(patient)` 傳回治好的量。傳進來的是 dict，`kind` 說是哪一科：
#
# - `"checkpoint"`：`tied`（設定檔說輸出頭與嵌入共用）、`embedding` 與 `head` [vocabulary, hidden]。病名 `"lost head"`：輸出頭在存檔時遺失，載入後全是 0，困惑度等於詞彙量。治好的是輸出頭；共用時就是嵌入，不共用而遺失的救不回來，傳回 `None`。
# - `"loss"`：`losses` [token]（每個 token 的 NLL）、`real` [token]、`reported`（報告的平均）。病名 `"padding"`：補齊的位置也算了進去。治好的是平均。
# - `"labels"`：`teacher`、`ids`：教師的 logits [seqlen, 詞彙量] 與 token [seqlen]。位置 t 的 logits 應該預測 token t + 1。病名 `"shifted"`：軟標籤錯位，位置 t 的 logits 預測的其實是 token t。治好的是對齊的 logits [seqlen − 1, 詞彙量]：第 t 列預測 token t + 1。沒病的 `mend` 傳回前 seqlen − 1 列。
#
# 沒病的 `diagnose` 傳回 `"healthy"`；前兩科沒病的，`mend` 傳回原來的輸出頭與平均。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 錯位：比較「logits[t] 給 token t 的 NLL」與「logits[t] 給 token t + 1 的 NLL」，哪個低就是哪種對齊。錯位時把整列往前移一格：第 t 列要用原來的第 t + 1 列。
#
# </details>


# %% solution clinic
def diagnose(patient: dict) -> str:
    """ "lost head", "padding", "shifted" or "healthy"."""
    ### BEGIN SOLUTION
    if patient["kind"] == "checkpoint":
        return "healthy" if patient["head"].any() else "lost head"
    if patient["kind"] == "loss":
        wanted = patient["losses"][patient["real"]].mean().item()
        return "healthy" if abs(patient["reported"] - wanted) < 1e-3 * wanted else "padding"
    log_p, ids = patient["teacher"].log_softmax(-1), patient["ids"]
    here = log_p.gather(-1, ids[:, None])[:-1].mean()
    following = log_p[:-1].gather(-1, ids[1:, None]).mean()
    return "shifted" if here > following else "healthy"
    ### END SOLUTION


def mend(patient: dict) -> Tensor | float | None:
    """The head, the mean or the logits as they should be; None where nothing can be done."""
    ### BEGIN SOLUTION
    ill = diagnose(patient) != "healthy"
    if patient["kind"] == "checkpoint":
        saved = patient["embedding"] if patient["tied"] else None
        return saved if ill else patient["head"]
    if patient["kind"] == "loss":
        return patient["losses"][patient["real"]].mean().item()
    return patient["teacher"][1:] if ill else patient["teacher"][:-1]
    ### END SOLUTION


# %% test clinic
@worth(3)
def heads(diagnose, mend, rng):
    """A head that was lost is found, and taken from the embedding where they were one."""
    for lost, tied in ((True, True), (False, True), (True, False), (False, False)):
        embedding, other = gaussian(20, 8, rng=rng), gaussian(20, 8, rng=rng)
        head = torch.zeros(20, 8) if lost else embedding.clone() if tied else other
        patient = {"kind": "checkpoint", "tied": tied, "embedding": embedding, "head": head}
        named = diagnose(patient) == ("lost head" if lost else "healthy")
        assert named, f"With a head that {'was' if lost else 'was not'} lost, diagnose gave the wrong name."
        mended = mend(patient)
        if lost and not tied:
            assert mended is None, "A head that was never tied cannot be made up."
        else:
            close(mended, embedding if tied else other, "the mended head", tolerance=0)


@worth(3)
def averages(diagnose, mend, rng):
    """A mean with padding in it is found and mended; one without is left alone."""
    for ill in (True, False):
        patient, wanted = right.loss_patient(rng, ill)
        named = diagnose(patient) == ("padding" if ill else "healthy")
        assert named, f"With{'' if ill else 'out'} padding in the mean, diagnose gave the wrong name."
        close(mend(patient), wanted, "the mean")


@worth(3)
def alignments(diagnose, mend, rng):
    """Soft labels that are off by one are found and aligned."""
    for ill in (True, False):
        patient, wanted = right.labels_patient(rng, ill)
        named = diagnose(patient) == ("shifted" if ill else "healthy")
        assert named, f"With soft labels {'off by one' if ill else 'in place'}, diagnose gave the wrong name."
        close(mend(patient), wanted, "the aligned logits", tolerance=0)


try_out(STUDENT, [diagnose, mend], heads, averages, alignments)
