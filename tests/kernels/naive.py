"""What the kernels compute, written down without a thought of speed, and how far float32 may take them from it.

Each function returns the exact value, and a bound of the error for each element. Nothing here is shared with the
operators' own definition, so that the two can be held against each other.
"""

import torch

EPSILON = 2.0**-24
#: Half a unit in the last place of a bfloat16, relative.
NARROW = 2.0**-8


def rounded(exact, error, dtype):
    return exact, error + (NARROW * (exact.abs() + error) + 1e-38 if dtype == torch.bfloat16 else 0)


def steps(value, scale, zero_point, most=255):
    """``value`` in steps of a quantizer: rounded as torch does it, in float32."""
    inverse = torch.tensor(1.0 / scale, dtype=torch.float32)
    counted = torch.round(value.float() * inverse).double() + zero_point
    return torch.where(counted.isnan(), 0.0, counted.clamp(0, most))


def padded(value, zero_point, padding):
    top, left, bottom, right = padding
    batch, height, width, channels = value.shape
    out = torch.full((batch, top + height + bottom, left + width + right, channels), float(zero_point)).double()
    out[:, top : top + height, left : left + width] = value.double()
    return out


def integer_conv(x, plain, scale, bias, residual, stride, dtype):
    """``plain`` is the weight ``[K, C, h, w]`` before it was packed."""
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(x.shape[1:3], plain.shape[2:], stride, strict=True))
    total = torch.zeros(x.shape[0], rows, columns, plain.shape[0], dtype=torch.float64)
    for i in range(plain.shape[2]):
        for j in range(plain.shape[3]):
            seen = x[:, i :: stride[0], j :: stride[1]][:, :rows, :columns].double()
            total += seen @ plain[:, :, i, j].double().T  # below 2^53, so exact
    parts = [total * scale.double(), bias.double().expand_as(total)]
    parts += [] if residual is None else [residual.double()]
    return rounded(sum(parts), 4 * EPSILON * sum(part.abs() for part in parts), dtype)


def pointwise_conv(x, plain, weight_scale, bias, residual, scale, zero_point, factors, dtype):
    """Of one quantizer; ``plain`` is the weight ``[K, C]`` before it was packed."""
    words = steps(scaled(x, factors), scale, zero_point, 65535)
    total = (words - zero_point) @ plain.double().T  # below 2^53, so exact
    factor = float(torch.tensor(scale, dtype=torch.float32)) * weight_scale.double()
    # The sums of the bytes are rounded one by one: that of the high bytes counts 256 times.
    high, low = torch.div(words, 256, rounding_mode="floor"), words % 256
    of_high = (high - zero_point // 256) @ plain.double().T
    of_low = (low - zero_point % 256) @ plain.double().T
    size = (256 * of_high.abs() + of_low.abs()) * factor
    parts = [total * factor, bias.double().expand_as(total)] + ([] if residual is None else [residual.double()])
    return rounded(sum(parts), 4 * EPSILON * (size + sum(part.abs() for part in parts)), dtype)


def group_norm(x, shift, weight, bias, groups, eps, silu):
    whole = torch.cat([part.double() for part in x], -1)
    moved = whole if shift is None else whole + shift.double()[:, None, None, :]
    batch, height, width, channels = whole.shape
    parts = moved.reshape(batch, height * width, groups, channels // groups)
    mean, variance = parts.mean((1, 3)), parts.var((1, 3), unbiased=False)
    rstd = (variance + eps).rsqrt()
    mean, rstd = (n.repeat_interleave(channels // groups, 1)[:, None, None, :] for n in (mean, rstd))
    exact = (moved - mean) * rstd * weight.double() + bias.double()
    offset = (moved - whole - mean) * rstd * weight.double() + bias.double()
    factor = rstd * weight.double()
    # The statistics themselves to 1e-6, the rest is one fused product; the last term is for what the mean loses.
    error = 2e-6 * ((exact - bias.double()).abs() + bias.double().abs()) + 4 * EPSILON * (whole * factor).abs()
    error = error + 4 * EPSILON * offset.abs() + 2e-6 * weight.double().abs()
    if silu:
        exact, error = exact * torch.sigmoid(exact), 1.1 * error + 2e-6 * exact.abs() + 1e-9
    return exact, error


def scaled(x, factors):
    """``x`` times a factor for each channel, where there are any: rounded to float32 as a product is."""
    return x if factors is None else x.float() * factors


def times(exact, error, factors):
    """A value that is known to ``error``, times a factor for each channel, where there are any."""
    if factors is None:
        return exact, error
    exact = exact * factors.double()
    return exact, error * factors.double().abs() + 4 * EPSILON * exact.abs()


def quantized(exact, error, scale, zero_point):
    """The bytes of a value that is known to ``error``: their exact place, and how far from it they may lie."""
    return (exact / scale + zero_point).clamp(0, 255), 0.5 + error / scale + 300 * EPSILON


def integer_attention(query, key, value, factor, scales, zero_points, dtype, deferred=False):
    heads = max(x.shape[1] for x in (query, key, value))
    operands = (query.float() * torch.tensor(factor, dtype=torch.float32), key, value)
    places = zip(operands, (scales[0], scales[1], scales[3]), zero_points, strict=True)
    q, k, v = (steps(x, scale, zero) - zero for x, scale, zero in places)
    q, k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k, v))
    scores = (q @ k.transpose(-2, -1)) * (scales[0] * scales[1])
    weights = ((scores - scores.amax(-1, keepdim=True)).exp() if deferred else torch.softmax(scores, -1)) / scales[2]
    spread = scores.abs().amax(-1, keepdim=True)
    doubt = weights * (1e-5 + 4 * EPSILON * spread) + 300 * EPSILON
    low, high = (torch.round(weights + sign * doubt).clamp(0, 255) for sign in (-1, 1))
    step = scales[2] * scales[3]
    steps_of_weights = torch.round(weights).clamp(0, 255)
    exact = steps_of_weights @ v * step
    error = ((high - low) @ v.abs() + 4 * EPSILON * (high @ v.abs())) * step
    if deferred:
        # A weight that turns by a step moves the quotient by its value, and the divisor by one.
        totals = [x.sum(-1, keepdim=True) * scales[2] for x in (steps_of_weights, low, high)]
        exact = exact / totals[0]
        error = (error + exact.abs() * (totals[2] - totals[1])) / totals[1] + 4 * EPSILON * exact.abs()
    return rounded(exact.transpose(1, 2), error.transpose(1, 2), dtype)


def image_rows(rows, table, images):
    """The row of each image: an item has as many images, one behind the other; a row outside is the nearest inside."""
    each = images // len(rows)
    return [min(max(int(rows[image // each]), 0), table - 1) for image in range(images)]


def by_image(images, rows, table, compute):
    """What ``compute(image, row)`` gives for each image, side by side: a value and how far it may be off."""
    parts = [compute(image, row) for image, row in enumerate(image_rows(rows, table, images))]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def integer_conv_rows(x, plain, weight_scale, bias, residual, table, stride, dtype):
    """``table``: scales, zero points and rows; ``x`` carries its border."""
    scales, zeros, rows = table

    def of_image(image, row):
        own = x[image : image + 1].double() - float(zeros[row])
        added = None if residual is None else residual[image : image + 1]
        return integer_conv(own, plain, weight_scale.double() * float(scales[row]), bias, added, stride, dtype)

    return by_image(len(x), rows, len(scales), of_image)


def quantized_rows(exact, error, table, padding):
    """The bytes of images that are known to ``error``, by each one's row, with a border of its zero points."""
    scales, zeros, rows = table
    top, left, bottom, right = padding

    def of_image(image, row):
        own = slice(image, image + 1)
        place, room = quantized(exact[own], error[own], float(scales[row]), int(zeros[row]))
        border = torch.nn.functional.pad(room, [0, 0, left, right, top, bottom])
        return padded(place, int(zeros[row]), padding), border

    return by_image(len(exact), rows, len(scales), of_image)


def quantized_image_rows(x, enlarge, table, padding):
    scales, zeros, rows = table

    def of_image(image, row):
        value = steps(x[image : image + 1], float(scales[row]), int(zeros[row]))
        value = value.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)
        return (padded(value, int(zeros[row]), padding),)

    return by_image(len(x), rows, len(scales), of_image)[0]


def integer_attention_rows(query, key, value, factor, scales, zero_points, rows, dtype, deferred=False):
    def of_image(image, row):
        own = [x[image : image + 1] if len(x) > 1 else x for x in (query, key, value)]
        zeros = zero_points[row].tolist()
        return integer_attention(*own, factor, scales[row].tolist(), [*zeros[:2], zeros[3]], dtype, deferred)

    return by_image(max(len(x) for x in (query, key, value)), rows, len(scales), of_image)
