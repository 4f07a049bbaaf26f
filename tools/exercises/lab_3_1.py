"""Exercises of Lab 3.1, with solutions: see `tools.exercises.master` for the form of this file."""

# %% markdown
# # Lab 3.1 練習：親手寫出量化 (Exercises)
#
# 共 {points} 分，十二題，由五分鐘到一個晚上，順序與 01 到 04 四個 notebook 相同。每題有四格（第 8、11 題多一格給你的程式）：題目、摺起來的提示、要你寫的一格、測試。所有題目都在很小的張量上，不用網路，也不用 GPU。
#
# **規則**
#
# - 把 `raise NotImplementedError()` 換成你的程式。答案寫在原來那一格裡；不要刪除、複製、搬動題目原有的格子。其他格不會執行：輔助函式與 import 也要寫在答案那一格裡，`STUDENT` 那一格只能有一行。
# - 答案裡只能匯入 torch、numpy、math 這一類套件。從 `common` 匯入現成的答案不給分。
# - 測試的輸入由 `STUDENT` 抽出，每個人不同；教師另有一組你看不到的輸入。訊息會說哪裡不對，不會說答案。
# - 後面的題目用到前面的函式時，批改用的是參考解答：同一個錯只扣一次分。
#
# 批改：`make grade LAB=3.1`，別處的檔案加 `FROM=路徑`。

# %% student
STUDENT = "your name or number"

# %% given
import math

import torch
from torch import Tensor

# %% checker
from common.course.exercises import close, error_at_output, pair, try_out, typed, worth
from common.course.exercises_3_1 import awq_errors, awq_weights, codes_for, hessian_patient, log_patient
from common.formats import gptq as gptq_files
from common.formats.packing import pack_rows
from common.methods import quantization
from common.methods.compensation import Hessian
from common.methods.quantization import QuantizeConfig


def gaussian(*shape, rng, scale=1.0):
    return torch.randn(*shape, generator=rng) * scale


def correlated(tokens, features, rng):
    """Inputs whose channels depend on one another and differ in size, as activations do."""
    mixing = gaussian(features, features // 2, rng=rng)
    sizes = torch.linspace(-1, 1, features).exp()[torch.randperm(features, generator=rng)]
    return (gaussian(tokens, features // 2, rng=rng) @ mixing.T + 0.3 * gaussian(tokens, features, rng=rng)) * sizes


def spread(weight, bits, group_size):
    """Scale and zero point of every column [out, in], from the course's grid."""
    grid = quantization.find_grid(weight, QuantizeConfig(bits, group_size, mse=False))
    return grid.scale.repeat_interleave(group_size, 1), grid.zero.repeat_interleave(group_size, 1)


def proper_codes(codes, weight, bits):
    typed(codes, torch.uint8, "The codes")
    close(codes, torch.zeros_like(weight), "codes", tolerance=math.inf)  # the shape alone
    outside = (codes >= 2**bits).sum()
    assert not outside, f"Codes must lie between 0 and 2**bits − 1; {outside} of {codes.numel()} do not."


def run_gptq(function, weight, matrix, bits, group_size, scale, zero):
    codes = function(weight, matrix, scale, zero, bits)
    proper_codes(codes, weight, bits)
    return codes, (codes.float() - zero) * scale


def agreement(codes, weight, matrix, bits, group_size, desc_act):
    config = QuantizeConfig(bits, group_size, mse=False, desc_act=desc_act)
    return (codes == quantization.gptq(weight, matrix, config).codes).float().mean().item()


# %% markdown grid
# ## 1 · 一個群組的格點 (A grid for one group) · {points} 分 · 5 分鐘
#
# 給你一個群組的權重 `w` [n] 與位元數，求非對稱格點的縮放因子 (scale) 與零點 (zero point)，使 $w\approx \text{scale}\cdot(\text{code}-\text{zero})$，code 是 0 到 $2^{bits}-1$ 的整數。格點要蓋住最小到最大的權重，**0 一定要能精確表示**（所以範圍要含 0，零點是整數而且也在 code 的範圍裡）。整個群組都是 0 時，scale 仍要是正數。
#
# 期望：每個權重的誤差不超過半格，兩端因為零點捨入最多再差半格。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 先把最小值壓到不大於 0、最大值抬到不小於 0；這個範圍分成 $2^{bits}-1$ 段。零點是「0 落在第幾格」。
#
# </details>


# %% solution grid
def find_grid(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point (a whole number, as a float) of a group of weights [n]; both have no dimensions."""
    ### BEGIN SOLUTION
    low, high = w.min().clamp(max=0), w.max().clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-7)
    zero = (-low / scale).round()
    return scale, zero
    ### END SOLUTION


# %% test grid
def decoded(find_grid, w, bits):
    scale, zero = (torch.as_tensor(x) for x in pair(find_grid(w, bits), "find_grid"))
    assert scale.shape == zero.shape == (), "scale and zero should have no dimensions: one of each for the group."
    assert scale > 0, "scale should be positive."
    assert zero == zero.round(), "The zero point should be a whole number."
    return scale, zero, (codes_for(w, scale, zero, bits) - zero) * scale


@worth(2)
def covers_the_weights(find_grid, rng):
    """The grid reaches from the smallest to the largest weight, and no further."""
    for bits, shift in ((2, 0.0), (3, 0.4), (4, -0.4), (8, 0.0)):
        w = gaussian(64, rng=rng) + shift
        scale, _, approximation = decoded(find_grid, w, bits)
        assert (approximation - w).abs().max() <= 1.001 * scale, f"With {bits} bits a weight lies outside of the grid."
        assert scale * (2**bits - 1) <= 1.001 * (w.max() - w.min()), f"With {bits} bits the grid is wider than needed."


@worth(2, after=covers_the_weights)
def zero_is_a_point(find_grid, rng):
    """Zero is a point of the grid, also where all weights are positive or all are negative."""
    for sign in (1, -1):
        w = sign * (gaussian(32, rng=rng).abs() + 0.5)
        scale, zero, approximation = decoded(find_grid, w, 4)
        assert 0 <= zero <= 15, "The zero point should be one of the codes."
        assert (approximation - w).abs().max() <= 1.001 * scale, "A weight lies outside of the grid."


@worth(1, after=covers_the_weights)
def group_of_zeros(find_grid, rng):
    """A group of zeros stays zero, without NaN."""
    _, _, approximation = decoded(find_grid, torch.zeros(16), 4)
    assert (approximation == 0).all(), "Zeros did not stay zero."


try_out(STUDENT, [find_grid], covers_the_weights, zero_is_a_point, group_of_zeros)

# %% markdown rtn
# ## 2 · 四捨五入到格點 (RTN) · {points} 分 · 10 分鐘
#
# 給你權重 `weight` [out, in] 與每個群組的 `scale`、`zero` [out, in / group_size]，求每個權重最近的 code（uint8），並寫出反量化 (dequantization)。群組是一列之中連續的 `group_size` 個輸入。
#
# 期望：沒有任何別的 code 比你的更接近。消融：把 4 位元換成 2 位元，誤差要大十倍以上。

# %% markdown
# <details><summary>💡 提示</summary>
#
# `repeat_interleave(group_size, dim=1)` 把每個群組的數字攤到它的每一欄。別忘了超出範圍的要截斷 (clamp)，先截斷再轉成 uint8。
#
# </details>


# %% solution rtn
def encode(weight: Tensor, scale: Tensor, zero: Tensor, group_size: int, bits: int) -> Tensor:
    """Codes uint8 [out, in] of weights [out, in]; scale and zero [out, in / group_size]."""
    ### BEGIN SOLUTION
    scale, zero = (t.repeat_interleave(group_size, dim=1) for t in (scale, zero))
    return (weight / scale + zero).round().clamp(0, 2**bits - 1).to(torch.uint8)
    ### END SOLUTION


def decode(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """The float32 weights [out, in] that codes stand for."""
    ### BEGIN SOLUTION
    scale, zero = (t.repeat_interleave(group_size, dim=1) for t in (scale, zero))
    return (codes.float() - zero) * scale
    ### END SOLUTION


# %% test rtn
@worth(3)
def nearest_code(encode, decode, rng):
    """Every code is the nearest one, and within range."""
    for bits, group_size in ((4, 8), (2, 16), (3, 32)):
        weight = gaussian(6, 32, rng=rng)
        grid = quantization.find_grid(weight, QuantizeConfig(bits, group_size, mse=False))
        weight = weight * 1.3  # some lie outside of the grid now
        codes = encode(weight, grid.scale, grid.zero, group_size, bits)
        proper_codes(codes, weight, bits)
        group = torch.arange(32) // group_size
        each = [(weight - grid.decode(torch.full_like(weight, c), group)).abs() for c in range(2**bits)]
        chosen = (weight - grid.decode(codes.float(), group)).abs()
        assert (chosen <= torch.stack(each).min(0).values + 1e-5).all(), "Some weight has a nearer code than yours."


@worth(2)
def back_again(encode, decode, rng):
    """Decoding gives the weights that codes stand for."""
    weight = gaussian(5, 32, rng=rng)
    grid = quantization.find_grid(weight, QuantizeConfig(4, 8, mse=False))
    codes = torch.randint(0, 16, (5, 32), generator=rng, dtype=torch.uint8)
    close(decode(codes, grid.scale, grid.zero, 8), grid.decode(codes.float(), torch.arange(32) // 8), "decode")


@worth(1, after=nearest_code)
def fewer_bits_do_badly(encode, decode, rng):
    """Ablation: two bits err more than ten times as much as four."""
    weight, errors = gaussian(16, 64, rng=rng), []
    for bits in (4, 2):
        grid = quantization.find_grid(weight, QuantizeConfig(bits, 16, mse=False))
        approximation = decode(encode(weight, grid.scale, grid.zero, 16, bits), grid.scale, grid.zero, 16)
        errors.append((approximation - weight).square().mean().item())
    assert errors[1] > 10 * errors[0] > 0, "The errors of 4 and 2 bits are not as expected: is everything rounded?"
    return f"{errors[1] / errors[0]:.0f} times."


try_out(STUDENT, [encode, decode], nearest_code, back_again, fewer_bits_do_badly)

# %% markdown pack
# ## 3 · 把 4 位元裝進 int32 (Pack nibbles) · {points} 分 · 15 分鐘
#
# GPTQ 的檔案把八個 4 位元的 code 裝進一個 int32：沿輸入的方向，**最低的四個位元放第一個**。`codes` 是 [in, out] 的 uint8，裝好是 [in / 8, out] 的 int32；再寫反方向。
#
# 期望：硬碟上的位元組數是 uint8 的一半，而且來回之後一個都不差。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 在 int64 裡移位、合併，最後才轉成 int32（第八個 code 大於 7 時符號位元會是 1，數字變成負的，這是對的）。拆開時負數右移會補 1，所以每次都要 `& 15`。
#
# </details>


# %% solution pack
def pack(codes: Tensor) -> Tensor:
    """Pack codes uint8 [in, out] below 16 into int32 [in / 8, out]."""
    ### BEGIN SOLUTION
    codes = codes.to(torch.int64).reshape(-1, 8, codes.shape[1])
    words = torch.zeros(len(codes), codes.shape[2], dtype=torch.int64)
    for i in range(8):
        words |= codes[:, i] << (4 * i)
    return words.to(torch.int32)
    ### END SOLUTION


def unpack(packed: Tensor) -> Tensor:
    """The codes uint8 [in, out] in int32 [in / 8, out]."""
    ### BEGIN SOLUTION
    codes = [(packed >> (4 * i)) & 15 for i in range(8)]
    return torch.stack(codes, dim=1).reshape(-1, packed.shape[1]).to(torch.uint8)
    ### END SOLUTION


# %% test pack
def some_codes(rng, rows=32, columns=6):
    return torch.randint(0, 16, (rows, columns), generator=rng, dtype=torch.uint8)


@worth(3)
def as_the_format_has_it(pack, unpack, rng):
    """Packed as GPTQ's files are: along the inputs, the first code in the lowest bits."""
    codes = some_codes(rng)
    words = pack(codes)
    typed(words, torch.int32, "Packed codes")
    close(words, pack_rows(codes, 4), "pack", tolerance=0)


@worth(2)
def unpacks(pack, unpack, rng):
    """Unpacking gives the codes, also from words that are negative."""
    codes = some_codes(rng)
    codes[7::8] |= 8
    found = unpack(pack_rows(codes, 4))
    typed(found, torch.uint8, "Unpacked codes")
    close(found, codes, "unpack", tolerance=0)


@worth(1)
def half_the_bytes(pack, unpack, rng):
    """There and back nothing is lost, and in between it takes half the bytes."""
    codes = some_codes(rng, 64, 3)
    words = pack(codes)
    typed(words, torch.int32, "Packed codes")
    close(unpack(words), codes, "unpack(pack(codes))", tolerance=0)
    assert 2 * words.nbytes == codes.nbytes, "The packed tensor does not take half the bytes."


try_out(STUDENT, [pack, unpack], as_the_format_has_it, unpacks, half_the_bytes)

# %% markdown hessian
# ## 4 · 由激活值算 Hessian (From activations) · {points} 分 · 10 分鐘
#
# 一層的輸出誤差 $\lVert X\Delta W^\top\rVert^2$（X 是 [n, in]）對權重的曲率是 $H=\tfrac{2}{n}X^\top X$，n 是**所有** token 的個數。校準資料分批來，每批 [batch, seqlen, in]，批的大小不同：不要存下激活值，邊看邊累加。
#
# 期望：怎麼分批，H 都一樣；$\mathrm{tr}(\Delta W H \Delta W^\top)$ 等於 $\tfrac{2}{n}\lVert X\Delta W^\top\rVert^2$。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 把每批壓平成 [token, in]。最後才除以 token 的總數；先平均每一批、再平均各批，在批的大小不同時是錯的。
#
# </details>


# %% solution hessian
def hessian(batches: list[Tensor]) -> Tensor:
    """H [in, in] of inputs that come in batches [batch, seqlen, in] of different sizes."""
    ### BEGIN SOLUTION
    width = batches[0].shape[-1]
    total, tokens = torch.zeros(width, width), 0
    for batch in batches:
        x = batch.reshape(-1, width).float()
        total += x.T @ x
        tokens += len(x)
    return 2 * total / tokens
    ### END SOLUTION


# %% test hessian
def some_batches(rng, width=12):
    return [gaussian(size, 5, width, rng=rng, scale=size) for size in (1, 4, 2)]


@worth(2)
def right_matrix(hessian, rng):
    """H is that of all tokens together."""
    batches = some_batches(rng)
    statistic = Hessian(12, batches[0])
    for batch in batches:
        statistic.add(batch.flatten(0, 1))
    close(hessian(batches), statistic.matrix, "H", ask="Is it 2/n, n all tokens?")


@worth(2, after=right_matrix)
def any_batches(hessian, rng):
    """How the tokens are cut into batches does not matter."""
    everything = torch.cat(some_batches(rng))
    close(hessian([everything[:3], everything[3:]]), hessian([everything]), "H from two batches")
    close(hessian([everything.transpose(0, 1)]), hessian([everything]), "H of the same tokens in another order")


@worth(1, after=right_matrix)
def is_the_curvature(hessian, rng):
    """tr(ΔW·H·ΔWᵀ) is the error at the output."""
    batches, change = some_batches(rng), gaussian(4, 12, rng=rng)
    x = torch.cat(batches).flatten(0, 1)
    wanted = 2 / len(x) * (x @ change.T).square().sum()
    close(torch.trace(change @ hessian(batches).float() @ change.T), wanted, "tr(ΔW·H·ΔWᵀ)")


try_out(STUDENT, [hessian], right_matrix, any_batches, is_the_curvature)

# %% markdown update
# ## 5 · GPTQ 的更新 (The update line) · {points} 分 · 20 分鐘
#
# 最左邊的一欄 $w_0$ 被換成 $q$（捨入之後的值）。其餘的欄該怎麼改，才使輸出誤差 $\mathrm{tr}(\Delta W H\Delta W^\top)$ 最小？給你 `weight` [out, n]、`column` [out]（換成的值）與**這 n 欄的** $H^{-1}$，傳回其餘的欄 [out, n − 1]。
#
# 期望：你的解是最小值，在其餘的欄上梯度是 0；輸出誤差（全部的列加起來）不到只捨入、不補償的 0.9 倍。消融：輸入彼此無關時（$H$ 是對角矩陣）沒有東西可補。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 限制條件是 $\Delta w_0=q-w_0$。用拉格朗日乘子：$\Delta W$ 的每一列與 $H^{-1}$ 的第 0 列成正比。比例由限制條件決定：要除以 $[H^{-1}]_{00}$。這裡用的是 $H^{-1}$，不是 $H$。
#
# </details>


# %% solution update
def update(weight: Tensor, column: Tensor, inverse: Tensor) -> Tensor:
    """The other columns [out, n - 1] of weight [out, n], after its first became `column` [out]; inverse: H⁻¹ [n, n]."""
    ### BEGIN SOLUTION
    error = (weight[:, 0] - column) / inverse[0, 0]
    return weight[:, 1:] - error[:, None] * inverse[0, 1:]
    ### END SOLUTION


# %% test update
def one_step(update, inputs, rng):
    """The rest of a random matrix after its first column was rounded, what it was, and H."""
    weight = gaussian(6, inputs.shape[1], rng=rng)
    matrix = (2 / len(inputs) * inputs.T @ inputs).double()
    column = weight[:, 0].round()
    rest = update(weight, column, matrix.inverse().float())
    close(rest, torch.zeros(6, inputs.shape[1] - 1), "the other columns", tolerance=math.inf)  # the shape alone
    return weight, torch.cat((column[:, None], rest.float()), 1), matrix


@worth(4)
def best_answer(update, rng):
    """No other change of the remaining columns would make the output error smaller."""
    weight, changed, matrix = one_step(update, correlated(200, 10, rng), rng)
    gradient = ((changed - weight).double() @ matrix)[:, 1:]
    reference = ((weight.round() - weight).double() @ matrix).abs().max()
    assert gradient.abs().max() < 1e-3 * reference, "The error could still be lowered: look at sign, H⁻¹ and divisor."


@worth(2)
def pays(update, rng):
    """The output error of all rows together falls to less than 0.9 times that without the update."""
    inputs = correlated(200, 10, rng)
    weight, changed, _ = one_step(update, inputs, rng)
    alone = torch.cat((changed[:, :1], weight[:, 1:]), 1)
    ratio = error_at_output(weight, changed, inputs) / error_at_output(weight, alone, inputs)
    assert ratio < 0.9, f"The error is {ratio:.2f} times that of not updating at all."
    return f"{ratio:.2f} times."


@worth(1, after=best_answer)
def nothing_to_gain(update, rng):
    """Ablation: where inputs have nothing to do with one another, nothing changes."""
    weight = gaussian(6, 8, rng=rng)
    inverse = torch.diag(torch.rand(8, generator=rng) + 0.5)
    close(update(weight, weight[:, 0].round(), inverse), weight[:, 1:], "the other columns")


try_out(STUDENT, [update], best_answer, pays, nothing_to_gain)

# %% markdown gptq
# ## 6 · 整個欄迴圈 (The whole column loop) · {points} 分 · 一個晚上
#
# 由左到右，每一欄捨入到它的格點，誤差由右邊還沒捨入的欄補償。`scale`、`zero` [out, in] 已經攤到每一欄。H 的對角線先加上阻尼 (damping) `damp` × 對角線的平均，再求反矩陣。傳回 code（uint8）。
#
# 期望：輸入相關時，輸出誤差不到 RTN 的 0.8 倍；和課程的 `gptq` 有 98 % 以上的 code 相同（剩下的差在浮點捨入）。消融：H 是對角矩陣時和 RTN 一模一樣。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 捨入第 i 欄之後，$H^{-1}$ 也要換成「其餘各欄的」反矩陣。最直接的寫法是每一步都做一次消去：$H^{-1}\leftarrow H^{-1}-\frac{[H^{-1}]_{:,i}[H^{-1}]_{i,:}}{[H^{-1}]_{ii}}$。更快的是一次 Cholesky：$H^{-1}=U^\top U$，U 是上三角，它的第 i 列，就是消去前 i 欄（第 0 到 i − 1 欄）之後 $H^{-1}$ 的第 i 列，除以當時對角元素的平方根。所以誤差 $e=(w_i-q)/U_{ii}$，更新是減去 $e\,U_{i,i+1:}$。
#
# </details>


# %% solution gptq
def gptq(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, bits: int, damp: float = 0.01) -> Tensor:
    """Codes uint8 [out, in] of weight [out, in]; hessian [in, in]; scale, zero [out, in]."""
    ### BEGIN SOLUTION
    work, codes = weight.clone(), torch.empty_like(weight)
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    for i in range(weight.shape[1]):
        codes[:, i] = (work[:, i] / scale[:, i] + zero[:, i]).round().clamp(0, 2**bits - 1)
        rounded = (codes[:, i] - zero[:, i]) * scale[:, i]
        error = (work[:, i] - rounded) / factor[i, i]
        work[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    return codes.to(torch.uint8)
    ### END SOLUTION


# %% test gptq
@worth(5)
def as_the_course(gptq, rng):
    """At least 98 % of the codes are those of the course's own GPTQ."""
    inputs, weight = correlated(300, 32, rng), gaussian(24, 32, rng=rng)
    matrix = 2 / len(inputs) * inputs.T @ inputs
    codes, _ = run_gptq(gptq, weight, matrix, 4, 16, *spread(weight, 4, 16))
    same = agreement(codes, weight, matrix, 4, 16, desc_act=False)
    assert same >= 0.98, (
        f"Only {same:.0%} are the same: is each column's error divided and passed on to all after it? "
        "Are damping and sign right?"
    )
    return f"{same:.1%}."


@worth(4)
def better_than_rounding(gptq, rng):
    """The output error is less than 0.8 times that of RTN."""
    inputs, weight = correlated(300, 32, rng), gaussian(24, 32, rng=rng)
    scale, zero = spread(weight, 3, 16)
    _, ours = run_gptq(gptq, weight, 2 / len(inputs) * inputs.T @ inputs, 3, 16, scale, zero)
    rounded = (codes_for(weight, scale, zero, 3) - zero) * scale
    ratio = error_at_output(weight, ours, inputs) / error_at_output(weight, rounded, inputs)
    assert ratio < 0.8, f"It is {ratio:.2f} times."
    return f"{ratio:.2f} times."


@worth(2)
def damping(gptq, rng):
    """A channel that was always zero does no harm, thanks to damping."""
    inputs, weight = correlated(300, 16, rng), gaussian(8, 16, rng=rng)
    inputs[:, 5] = 0
    matrix = 2 / len(inputs) * inputs.T @ inputs
    codes, _ = run_gptq(gptq, weight, matrix, 4, 16, *spread(weight, 4, 16))
    same = agreement(codes, weight, matrix, 4, 16, desc_act=False)
    assert same >= 0.95, f"Only {same:.0%} of the codes are those of the course's GPTQ."


@worth(1, after=as_the_course)
def diagonal_is_rounding(gptq, rng):
    """Ablation: with a diagonal H it is RTN."""
    weight = gaussian(8, 16, rng=rng)
    scale, zero = spread(weight, 4, 8)
    codes, _ = run_gptq(gptq, weight, torch.diag(torch.rand(16, generator=rng) + 0.5), 4, 8, scale, zero)
    close(codes, codes_for(weight, scale, zero, 4), "codes", tolerance=0)


try_out(STUDENT, [gptq], as_the_course, better_than_rounding, damping, diagonal_is_rounding)

# %% markdown act_order
# ## 7 · 降序激活排序 (Act-order) · {points} 分 · 15 分鐘
#
# 先捨入哪些欄？越後面捨入的欄，替前面擔的誤差越多，右邊能替它分擔的卻越少。所以先捨入激活值大的：依 H 的對角線由大到小排，用你的 `gptq`，再排回來。每個權重的格點不因順序而變。
#
# 期望：和課程的 `desc_act=True` 有 98 % 以上相同；離群的通道放在最後面時，誤差不到由左到右的 0.9 倍。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 權重與格點的欄、H 的列**和**欄都要重排。`argsort(order)` 是反過來的排列。
#
# </details>


# %% solution act_order
def gptq_act_order(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Like `gptq`, columns with the largest activations first; codes are in the weight's own order."""
    ### BEGIN SOLUTION
    order = hessian.diagonal().argsort(descending=True)
    permuted = hessian[order][:, order]
    codes = gptq(weight[:, order], permuted, scale[:, order], zero[:, order], bits)
    return codes[:, order.argsort()]
    ### END SOLUTION


# %% test act_order
@worth(4)
def as_the_course_orders(gptq_act_order, rng):
    """At least 98 % of the codes are those of the course's GPTQ with act-order."""
    inputs, weight = correlated(300, 32, rng), gaussian(24, 32, rng=rng)
    matrix = 2 / len(inputs) * inputs.T @ inputs
    codes, _ = run_gptq(gptq_act_order, weight, matrix, 4, 16, *spread(weight, 4, 16))
    same = agreement(codes, weight, matrix, 4, 16, desc_act=True)
    assert same >= 0.98, (
        f"Only {same:.0%} are the same: are H's rows and columns, scale and zero all reordered, and the codes put back?"
    )
    return f"{same:.1%}."


@worth(2)
def helps_with_outliers(gptq_act_order, rng):
    """With the large channels last, the error is less than 0.9 times that of going from left to right."""
    sizes = torch.ones(32)
    sizes[28:] = 8
    inputs, weight = correlated(300, 32, rng) * sizes, gaussian(64, 32, rng=rng)
    matrix = 2 / len(inputs) * inputs.T @ inputs
    scale, zero = spread(weight, 3, 16)
    _, ordered = run_gptq(gptq_act_order, weight, matrix, 3, 16, scale, zero)
    plain = quantization.gptq(weight, matrix, QuantizeConfig(3, 16, mse=False, desc_act=False)).dequantize()
    ratio = error_at_output(weight, ordered, inputs) / error_at_output(weight, plain, inputs)
    assert ratio < 0.9, f"It is {ratio:.2f} times."
    return f"{ratio:.2f} times."


try_out(STUDENT, [gptq_act_order], as_the_course_orders, helps_with_outliers)

# %% markdown awq
# ## 8 · AWQ 的縮放搜尋 (Scale search) · {points} 分 · 30 分鐘
#
# 輸入通道 j 的權重乘上 $s_j=\overline{|x_j|}^{\,\alpha}$（先對 token 平均，再取 α 次方）再捨入，推論時把 $s_j$ 除回來：數學上什麼都沒變，但激活值大的通道捨入得比較細。對 `alphas` 裡的每個 α 捨入一次，傳回輸出誤差 $\lVert X(\hat W-W)^\top\rVert^2$（X 是 [n, in]）最小的 α（傳回 `alphas` 裡的那個數：float，不是張量），以及它的 $\hat W$。`quantized(weight, bits, group_size)`（已經給你）捨入到格點再還原。
#
# 期望：有大通道時選到的 α 大於 0，誤差不到 α = 0 的 0.9 倍。消融：通道一樣大時，AWQ 幾乎沒有好處。


# %% given
from common.course.exercises_given import quantized

# %% markdown
# <details><summary>💡 提示</summary>
#
# 課程把 $s$ 除以 $\sqrt{\max s\cdot\min s}$，讓它的大小以 1 為中心；這不影響結果，因為格點會跟著縮放。比的是**還原之後**的權重在輸出上的誤差，不是權重的誤差。
#
# </details>


# %% solution awq
def awq(weight: Tensor, inputs: Tensor, alphas: list[float], bits: int, group_size: int) -> tuple[float, Tensor]:
    """The best α, and the weights [out, in] that inference then sees; inputs [tokens, in]."""
    ### BEGIN SOLUTION
    best = (math.inf, 0.0, weight)
    for alpha in alphas:
        scale = inputs.abs().mean(0).clamp(min=1e-4) ** alpha
        approximation = quantized(weight * scale, bits, group_size) / scale
        error = ((approximation - weight) @ inputs.T).square().sum().item()
        if error < best[0]:
            best = (error, alpha, approximation)
    return best[1:]
    ### END SOLUTION


# %% test awq
ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.0]


def chosen(awq, inputs, rng, alphas):
    """The chosen α, its error and, for each α, what the error would be; all at the output."""
    weight = gaussian(32, inputs.shape[1], rng=rng)
    alpha, approximation = pair(awq(weight, inputs, alphas, 3, 16), "awq")
    assert isinstance(alpha, float), f"α should be a float out of `alphas`, not {type(alpha).__name__}."
    assert alpha in alphas, "α should be one of those given."
    close(approximation, weight, "the weights", tolerance=math.inf)  # the shape alone
    return alpha, error_at_output(weight, approximation, inputs), awq_errors(weight, inputs, alphas)


@worth(3)
def best_of_all(awq, rng):
    """The α with the lowest error at the output is chosen, whatever the order they are given in."""
    for _ in range(3):
        inputs = gaussian(200, 32, rng=rng) * torch.linspace(-2, 2, 32).exp()
        order = torch.randperm(5, generator=rng).tolist()
        alpha, _, errors = chosen(awq, inputs, rng, [ALPHAS[i] for i in order])
        assert errors[alpha] <= 1.001 * min(errors.values()), "Another α has a lower error at the output."


@worth(3)
def weights_of_that_alpha(awq, rng):
    """The weights returned are those that inference sees with this α."""
    inputs = gaussian(200, 32, rng=rng) * torch.linspace(-2, 2, 32).exp()[torch.randperm(32, generator=rng)]
    seldom = inputs * torch.where(torch.rand(200, 32, generator=rng) < torch.linspace(0.1, 1, 32), 1, 0)
    weight = gaussian(32, 32, rng=rng)
    _, found = pair(awq(weight, seldom, [0.5], 3, 16), "awq")
    close(found, weight, "the weights", tolerance=math.inf)  # the shape alone
    right, swapped = ((awq_weights(weight, seldom, 0.5, first) - found).abs().mean() for first in (False, True))
    assert right <= 2 * swapped, "With α = 0.5: s is the power of the mean over tokens, not the mean of powers."
    alpha, error, errors = chosen(awq, inputs, rng, ALPHAS)
    assert abs(error - errors[alpha]) <= 0.01 * errors[alpha], "They err otherwise: is s divided out, and rounded once?"
    assert error < 0.9 * errors[0.0], "The error is not below 0.9 times that of α = 0."
    return f"α = {alpha}: {error / errors[0.0]:.2f} times the error of α = 0."


@worth(1, after=best_of_all)
def equal_channels(awq, rng):
    """Ablation: where all channels are equally large, less than a tenth is gained."""
    _, error, errors = chosen(awq, gaussian(500, 32, rng=rng), rng, ALPHAS)
    assert 0.9 * errors[0.0] < error <= 1.001 * errors[0.0], "The gain is not as expected."


try_out(STUDENT, [awq], best_of_all, weights_of_that_alpha, equal_channels)

# %% markdown bytes
# ## 9 · 一個檔案有多少位元組 (Bytes of a checkpoint) · {points} 分 · 15 分鐘
#
# 一個 GPTQ v1 檔案裡，每個量化的 [out, in] 矩陣存四個張量：`qweight`（code，裝進 int32）、`qzeros`（每個群組的零點，同樣的位元數，裝進 int32）、`scales`（每個群組 16 位元）、`g_idx`（每個輸入一個 int32）。其餘 `others` 個參數以 16 位元存。算出張量的總位元組數。
#
# 期望：和真正寫出來的張量一個位元組都不差。4 位元的檔案到不了四分之一：算算看群組大小 32 時，大約是 16 位元的幾分之一？

# %% markdown
# <details><summary>💡 提示</summary>
#
# 一個群組是一列之中的 `group_size` 個輸入，所以一個矩陣有 out × in / group_size 個群組。位元數乘個數再除以 8。
#
# </details>
#
# <details><summary>最後那一問的答案</summary>
#
# 群組大小 32 時，每個權重是 4 位元的 code，加上攤到 32 個權重上的零點與縮放因子：$4+\tfrac{4+16}{32}=4.625$ 位元，是 16 位元的 0.289 倍，約 1/3.5。`g_idx` 再加 32 / out 位元，矩陣夠高時看不出來；沒有量化的參數則會讓整個檔案更大。
#
# </details>


# %% solution bytes
def checkpoint_bytes(shapes: list[tuple[int, int]], others: int, bits: int, group_size: int) -> int:
    """Bytes of all tensors: matrices of `shapes` [out, in] quantized, `others` more numbers in 16 bits."""
    ### BEGIN SOLUTION
    total = 2 * others
    for rows, columns in shapes:
        groups = rows * columns // group_size
        total += rows * columns * bits // 8 + groups * bits // 8 + 2 * groups + 4 * columns
    return total
    ### END SOLUTION


# %% test bytes
def real_bytes(shapes, bits, group_size, rng):
    total = 0
    for shape in shapes:
        weight = quantization.rtn(gaussian(*shape, rng=rng), QuantizeConfig(bits, group_size, mse=False))
        total += sum(tensor.nbytes for tensor in gptq_files.pack_linear(weight).values())
    return total


@worth(3)
def to_the_byte(checkpoint_bytes, rng):
    """As many bytes as the tensors that the course writes."""
    for bits, group_size in ((4, 32), (4, 64), (2, 64), (8, 128)):
        shapes = [tuple(128 * torch.randint(1, 4, (2,), generator=rng)) for _ in range(3)]
        shapes = [tuple(int(side) for side in shape) for shape in shapes]
        found = checkpoint_bytes(shapes, 0, bits, group_size)
        wanted = real_bytes(shapes, bits, group_size, rng)
        assert isinstance(found, int), "Bytes come in whole numbers (int)."
        assert found == wanted, f"With {bits} bits and groups of {group_size} you are {found - wanted:+,} bytes off."


@worth(1)
def the_others(checkpoint_bytes, rng):
    """What is not quantized counts too."""
    others = int(torch.randint(1000, 9999, (), generator=rng))
    more = checkpoint_bytes([(128, 128)], others, 4, 32) - checkpoint_bytes([(128, 128)], 0, 4, 32)
    assert more == 2 * others, f"{others:,} numbers in 16 bits should not take {more:,} bytes."


try_out(STUDENT, [checkpoint_bytes], to_the_byte, the_others)

# %% markdown foreign
# ## 10 · 讀別人的檔案 (The other zero-point convention) · {points} 分 · 20 分鐘
#
# GPTQ 的 v1 檔案存「零點減 1」，v2 存零點本身，而檔案不一定說它是哪一種。給你 `codes` [out, in]、存著的 `stored` [out, groups] 與 `scale` [out, groups]，判斷是 v1 還是 v2（傳回 1 或 2），並還原權重。`stored` 是 int32，v1 的可能是 −1；平均之前先轉成浮點數。
#
# 期望：訓練出來的權重平均值幾乎是 0，讀錯慣例則每個權重都偏一格。消融：用錯的慣例讀，相對誤差大於 1 %。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 看 code 減去存著的零點，對整個矩陣的平均：v2 約是 0，v1 約是 1。
#
# </details>


# %% solution foreign
def read_foreign(codes: Tensor, stored: Tensor, scale: Tensor) -> tuple[int, Tensor]:
    """1 or 2, the version of the format; and the weights [out, in]."""
    ### BEGIN SOLUTION
    group_size = codes.shape[1] // stored.shape[1]
    zero, scale = (t.float().repeat_interleave(group_size, dim=1) for t in (stored, scale))
    difference = codes.float() - zero
    version = 1 if difference.mean() > 0.5 else 2
    return version, (difference - (2 - version)) * scale
    ### END SOLUTION


# %% test foreign
def a_file(version, sym, rng):
    """A quantized matrix, and its zero points as this version of the format stores them."""
    made = quantization.rtn(gaussian(64, 128, rng=rng, scale=0.02), QuantizeConfig(4, 32, sym=sym, mse=False))
    return made, made.zero.int() - int(version == 1)


@worth(3)
def tells_them_apart(read_foreign, rng):
    """The version is found from the numbers, for symmetric and asymmetric files."""
    for version, sym in ((1, True), (2, True), (1, False), (2, False)):
        made, stored = a_file(version, sym, rng)
        found, _ = pair(read_foreign(made.codes, stored, made.scale), "read_foreign")
        assert found == version, f"A {'symmetric' if sym else 'asymmetric'} file was taken for the other version."


@worth(3)
def reads_them(read_foreign, rng):
    """The weights are those that were written; with the other convention they would be off by more than 1 %."""
    for version in (2, 1):
        made, stored = a_file(version, False, rng)
        _, weight = pair(read_foreign(made.codes, stored, made.scale), "read_foreign")
        close(weight, made.dequantize(), "the weights", tolerance=1e-3)
        shift = made.scale.float().repeat_interleave(32, 1)
        assert shift.square().sum() > 0.01 * made.dequantize().square().sum(), "The ablation does no harm."


try_out(STUDENT, [read_foreign], tells_them_apart, reads_them)

# %% markdown triton
# ## 11 · 加分題：反量化的乘法 (A Triton dequantizing product) · {points} 分 · 一個晚上
#
# 解碼的一步是「矩陣乘一個 token」：$y=\hat W x$。先還原成浮點數的矩陣再乘，4 位元省下的讀取就還回去了；要快，code 得在暫存器裡變成數字，用完就丟。請用 Triton 寫這個核心函式 (kernel)：每個程式算 `ROWS` 個輸出，一個群組一個群組地讀 `words`，拆出八個 code，減零點、乘縮放因子、乘輸入、累加。
#
# `words` int32 [out, groups × WORDS]：沿輸入方向每八個 code 一個 int32，最低的四個位元是第一個。`scale`、`zero` [out, groups] 是 float32，`x` [groups × WORDS × 8] 也是。輸出的個數不一定是 `ROWS` 的倍數：最後一個程式要遮住多出來的列，讀與寫都要。這裡用 Triton 的直譯器在 CPU 上跑，不需要 GPU；沒有安裝 Triton 時這一題略過，不計分。
#
# 期望：與還原之後再乘相差不到萬分之一（設定）；`out` 後面的記憶體原封不動。


# %% given triton
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then run in Python, on the CPU
try:
    import triton
    import triton.language as tl
except ImportError:  # then this exercise is skipped
    from types import SimpleNamespace

    triton = tl = SimpleNamespace(jit=lambda kernel: kernel, constexpr=int)

ROWS = 16  # outputs of a program


def launch(kernel, x: Tensor, words: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """What a kernel writes, and what lies behind it up to a multiple of ROWS: NaN where it wrote nothing."""
    outputs, groups = scale.shape
    programs = -(-outputs // ROWS)
    out = torch.full((programs * ROWS,), math.nan)
    kernel[(programs,)](x, words, scale, zero, out, outputs, groups, ROWS=ROWS, WORDS=words.shape[1] // groups)
    return out


# %% markdown
# <details><summary>💡 提示</summary>
#
# 程式的列是 `tl.program_id(0) * ROWS + tl.arange(0, ROWS)`；第 g 個群組的字是 `g * WORDS + tl.arange(0, WORDS)`，兩者用 `[:, None]` 與 `[None, :]` 張成一塊 [ROWS, WORDS]。第 `place` 個 code 是 `(word >> 4 * place) & 15`：字可能是負的，右移會補 1，所以 `& 15` 不能省。它的輸入在 `8 * 字 + place`。
#
# 讀寫都帶 `mask=`；要快的寫法（張量核心、不轉型別）見 `common/methods/int4_kernel.py`。
#
# </details>


# %% solution triton
@triton.jit
def kernel(x, words, scale, zero, out, outputs, groups, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """ROWS outputs of one token; a group is WORDS words of a row."""
    ### BEGIN SOLUTION
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < outputs
    total = tl.zeros((ROWS,), tl.float32)
    for group in range(groups):
        at = group * WORDS + tl.arange(0, WORDS)
        word = tl.load(words + row[:, None] * (groups * WORDS) + at[None, :], mask=here[:, None], other=0)
        origin = tl.load(zero + row * groups + group, mask=here, other=0)
        part = tl.zeros((ROWS,), tl.float32)
        for place in range(8):
            code = ((word >> 4 * place) & 15).to(tl.float32)
            part += tl.sum((code - origin[:, None]) * tl.load(x + 8 * at + place)[None, :], 1)
        total += tl.load(scale + row * groups + group, mask=here, other=0) * part
    tl.store(out + row, total, mask=here)
    ### END SOLUTION


def product(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Your kernel's outputs, and what lies behind them."""
    return launch(kernel, x, words, scale, zero)


# %% test triton
def packed_layer(rng, outputs, groups, words=4):
    """Inputs, words, scale and zero points of a random 4-bit layer, and its outputs in float64."""
    codes = torch.randint(0, 16, (outputs, groups * words * 8), generator=rng, dtype=torch.uint8)
    scale = torch.rand(outputs, groups, generator=rng) + 0.5
    zero = torch.randint(0, 16, (outputs, groups), generator=rng).float()
    x = gaussian(codes.shape[1], rng=rng)
    each = (codes.double() - zero.repeat_interleave(8 * words, 1)) * scale.repeat_interleave(8 * words, 1)
    return (x, pack_rows(codes.T.contiguous(), 4).T.contiguous(), scale, zero), each @ x.double()


@worth(3)
def right_outputs(product, rng):
    """The outputs are those of the dequantized matrix."""
    for outputs, groups in ((16, 1), (32, 3)):
        inputs, wanted = packed_layer(rng, outputs, groups)
        close(product(*inputs), wanted, "the product", ask="Is each code in its place, with its group's grid?")


@worth(2)
def masked(product, rng):
    """With a number of outputs that is no multiple of ROWS all are right, and nothing behind them is written."""
    inputs, wanted = packed_layer(rng, 21, 2)
    found = product(*inputs)
    close(found[:21], wanted, "the product")
    assert found[21:].isnan().all(), "Memory behind the last output was written."


@worth(1, after=right_outputs)
def one_grid_a_group(product, rng):
    """Doubling one group's scale adds that group's share, and no more."""
    (x, words, scale, zero), wanted = packed_layer(rng, 16, 3)
    alone = torch.zeros_like(x)
    alone[32:64] = x[32:64]
    share = product(alone, words, scale, zero)
    scale = scale.clone()
    scale[:, 1] *= 2
    close(product(x, words, scale, zero), wanted + share.double(), "the product")


try_out(STUDENT, [product], right_outputs, masked, one_grid_a_group, needs="triton")

# %% markdown clinic
# ## 12 · 診所 (The clinic) · {points} 分 · 一個晚上
#
# 三種病人，每一種都可能其實沒病。`diagnose(patient)` 看一份紀錄，傳回病名；`mend(patient)` 傳回治好的量。傳進來的是 dict，`kind` 說是哪一科：
#
# - `"layer"`：`weight` [out, in] 是從檔案還原的權重，`scale` [out, in] 是每個權重的縮放因子。病名 `"zeros"`：零點差了一格，所有權重都偏同一個方向剛好一格。治好的是權重。
# - `"hessian"`：`hessian` [in, in]。病名 `"singular"`：有些通道在校準時一直是 0，H 沒有反矩陣。治好的是可以做 Cholesky 分解的 H：死的通道，對角線補上其餘通道對角線的平均，其他一律不動。
# - `"log"`：`nll`（總和，nats）、`tokens`、`words`、`perplexity`。病名 `"per word"`：困惑度除錯了分母（Llama-2-7B 的 5.47 因此變成 8.71）。治好的是每個 token 的困惑度。
#
# 沒病的傳回 `"healthy"`，`mend` 則原樣傳回那個量。
#
# 期望：零點差一格的兩個方向都治得好，沒病的不誤診。

# %% markdown
# <details><summary>💡 提示</summary>
#
# 零點：健康的層，`weight / scale` 的平均幾乎是 0；偏了一格時約是 ±1，兩個方向都可能。Hessian：看對角線。紀錄：困惑度是 $\exp(\text{nll}/n)$，算兩種 n，看哪一個和紀錄相符。
#
# </details>


# %% solution clinic
def diagnose(patient: dict) -> str:
    """ "zeros", "singular", "per word" or "healthy"."""
    ### BEGIN SOLUTION
    if patient["kind"] == "layer":
        return "zeros" if (patient["weight"] / patient["scale"]).mean().abs() > 0.5 else "healthy"
    if patient["kind"] == "hessian":
        return "singular" if (patient["hessian"].diagonal() == 0).any() else "healthy"
    per_token = math.exp(patient["nll"] / patient["tokens"])
    return "healthy" if abs(patient["perplexity"] / per_token - 1) < 0.01 else "per word"
    ### END SOLUTION


def mend(patient: dict) -> Tensor | float:
    """The weights, the Hessian or the perplexity as it should be."""
    ### BEGIN SOLUTION
    if patient["kind"] == "layer":
        steps = (patient["weight"] / patient["scale"]).mean().round()
        return patient["weight"] - steps * patient["scale"]
    if patient["kind"] == "hessian":
        diagonal = patient["hessian"].diagonal()
        dead = diagonal == 0
        return patient["hessian"] + torch.diag(dead * diagonal[~dead].mean())
    return math.exp(patient["nll"] / patient["tokens"])
    ### END SOLUTION


# %% test clinic
def layer_patient(rng, steps):
    """A layer whose zero points are off by `steps`, and its true weights."""
    made = quantization.rtn(gaussian(32, 64, rng=rng, scale=0.02), QuantizeConfig(4, 32, mse=False))
    scale = made.scale.float().repeat_interleave(32, 1)
    return {"kind": "layer", "weight": made.dequantize() + steps * scale, "scale": scale}, made.dequantize()


@worth(3)
def zero_points(diagnose, mend, rng):
    """Zero points off by one, either way, are found and mended; healthy layers are left alone."""
    for steps, name in ((1, "zeros"), (0, "healthy"), (-1, "zeros")):
        patient, weight = layer_patient(rng, steps)
        assert diagnose(patient) == name, f"With zero points off by {steps}, diagnose gave the wrong name."
        close(mend(patient), weight, "the mended weights", tolerance=1e-3)


@worth(3)
def singular_hessians(diagnose, mend, rng):
    """A Hessian with dead channels is found, and can be factorized once mended."""
    for dead in (1, 0, 3):
        patient, wanted = hessian_patient(rng, dead)
        named = diagnose(patient) == ("singular" if dead else "healthy")
        assert named, f"With {dead} dead channel(s), diagnose gave the wrong name."
        after = mend(patient)
        close(after, wanted, "the mended Hessian")
        assert not torch.linalg.cholesky_ex(after).info, "The mended Hessian is still not positive definite."


@worth(3)
def logs(diagnose, mend, rng):
    """A perplexity per word is told from one per token, and mended."""
    for sick in (True, False):
        patient, wanted = log_patient(rng, sick)
        named = diagnose(patient) == ("per word" if sick else "healthy")
        assert named, f"With a perplexity per {'word' if sick else 'token'}, diagnose gave the wrong name."
        close(mend(patient), wanted, "the perplexity", tolerance=2e-3)


try_out(STUDENT, [diagnose, mend], zero_points, singular_hessians, logs)
