"""The operators that an artefact may hold: an explicit list, because torch has some that open files.

An operator is on it when ``torch.export`` of a supported model or one of our passes makes it. None writes to its
arguments, none is random, none takes a text except for the few with a list of values below.
"""

from __future__ import annotations

__all__ = ["FIXED", "OPERATORS", "PYTHON_OPERATORS", "TEXTS"]


def _overloads(namespace: str, text: str) -> frozenset[str]:
    """``torch.ops.aten.add.Tensor`` and so on, from ``add.Tensor``; a name alone means ``default``."""
    return frozenset(f"torch.ops.{namespace}.{name if '.' in name else f'{name}.default'}" for name in text.split())


ARITHMETIC = """
    abs neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square sin cos tan asin acos atan sinh cosh
    atan2 erf erfc floor ceil round round.decimals trunc frac sign sigmoid tanh relu relu6 silu gelu mish elu selu celu
    leaky_relu hardtanh hardsigmoid hardswish softplus log_sigmoid glu prelu
    add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Tensor rsub.Scalar mul.Tensor mul.Scalar
    div.Tensor div.Scalar div.Tensor_mode div.Scalar_mode true_divide.Tensor floor_divide floor_divide.Scalar
    remainder.Tensor remainder.Scalar fmod.Tensor fmod.Scalar
    pow.Tensor_Tensor pow.Tensor_Scalar pow.Scalar maximum minimum max.other min.other
    clamp clamp.Tensor clamp_min clamp_min.Tensor clamp_max clamp_max.Tensor clip
    lerp.Tensor lerp.Scalar addcmul addcdiv nan_to_num isnan isinf isfinite
    eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar
    ge.Tensor ge.Scalar logical_and logical_or logical_not logical_xor
    bitwise_and.Tensor bitwise_and.Scalar bitwise_or.Tensor bitwise_or.Scalar bitwise_xor.Tensor bitwise_not
    __and__.Tensor __or__.Tensor __xor__.Tensor
    where.self where.ScalarOther where.ScalarSelf where.Scalar masked_fill.Scalar masked_fill.Tensor
"""
VIEWS = """
    view view.dtype _unsafe_view reshape view_as reshape_as flatten.using_ints unflatten.int squeeze squeeze.dim
    squeeze.dims unsqueeze permute transpose.int t swapaxes swapdims movedim.int movedim.intlist
    numpy_T mT adjoint expand expand_as broadcast_to slice.Tensor select.int narrow
    chunk split.Tensor split.sizes split_with_sizes tensor_split.sections tensor_split.indices unbind.int
    unsafe_split.Tensor unsafe_chunk diagonal alias detach contiguous view_as_real view_as_complex real imag unfold
    atleast_1d atleast_2d resolve_conj resolve_neg lift_fresh_copy clone
"""
REARRANGING = """
    cat concat concatenate stack hstack vstack repeat repeat_interleave.self_int tile flip roll rot90 tril triu
    index.Tensor index_select gather take_along_dim embedding
    scatter.src scatter.value scatter_add index_add index_copy index_fill.int_Scalar index_fill.int_Tensor
    index_put slice_scatter select_scatter diagonal_scatter as_strided_scatter copy zero
    pad_sequence
    pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d pixel_shuffle pixel_unshuffle im2col col2im channel_shuffle meshgrid meshgrid.indexing
    upsample_nearest1d upsample_nearest1d.vec upsample_nearest2d upsample_nearest2d.vec upsample_nearest3d
    upsample_nearest3d.vec upsample_linear1d upsample_linear1d.vec upsample_bilinear2d upsample_bilinear2d.vec
    upsample_bicubic2d upsample_bicubic2d.vec upsample_trilinear3d upsample_trilinear3d.vec
    _upsample_nearest_exact1d.vec _upsample_nearest_exact2d.vec _upsample_nearest_exact3d.vec
    _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec grid_sampler grid_sampler_2d affine_grid_generator
"""
REDUCTIONS = """
    sum sum.dim_IntList mean mean.dim amax amin aminmax max max.dim min min.dim prod prod.dim_int std.dim
    std.correction var.dim var.correction var_mean.dim var_mean.correction norm.Scalar norm.ScalarOpt_dim
    linalg_vector_norm linalg_norm logsumexp
    all all.dim any any.dim argmax argmin cumsum cumprod softmax.int _softmax log_softmax.int _log_softmax
    _safe_softmax topk sort _weight_norm
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices
"""
WEIGHTED = """
    linear matmul mm bmm addmm baddbmm dot mv outer inner einsum bilinear tensordot
    conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding convolution
    conv_transpose1d conv_transpose2d.input conv_transpose3d.input scaled_dot_product_attention
    group_norm native_group_norm layer_norm native_layer_norm rms_norm batch_norm _native_batch_norm_legit_no_training
    instance_norm cosine_similarity
"""
CREATING = """
    arange arange.start arange.start_step linspace logspace full full_like zeros zeros_like ones ones_like eye
    new_zeros new_ones new_full scalar_tensor fill.Scalar fill.Tensor
    polar complex
    sym_size.int sym_stride.int sym_numel sym_storage_offset
"""
CASTS = """
    to.dtype to.dtype_layout to.device to.other _to_copy type_as
"""

#: ATen's, and those of torch's quantization and of this package.
OPERATORS = (
    _overloads("aten", " ".join((ARITHMETIC, VIEWS, REARRANGING, REDUCTIONS, WEIGHTED, CREATING, CASTS)))
    | _overloads("prims", "convert_element_type view_of")
    | _overloads(
        "quantized_decomposed",
        """
        quantize_per_tensor quantize_per_tensor.tensor quantize_per_channel
        dequantize_per_tensor dequantize_per_tensor.tensor dequantize_per_channel
        """,
    )
    | _overloads("tfmq_fx", "timestep_row")
)

#: What exported graphs compute sizes with; no power, whose result can be of any length, and nothing that calls back.
PYTHON_OPERATORS = frozenset(
    {
        *(
            "_operator.add",
            "_operator.sub",
            "_operator.mul",
            "_operator.floordiv",
            "_operator.mod",
            "_operator.truediv",
        ),
        *("_operator.neg", "_operator.pos", "_operator.eq", "_operator.ne", "_operator.lt", "_operator.le"),
        *("_operator.gt", "_operator.ge", "_operator.and_", "_operator.or_", "math.trunc", "torch.sym_int"),
        *("torch.sym_float", "torch.sym_not", "torch.sym_max", "torch.sym_min", "torch.sym_ite"),
    }
)

#: By name, the arguments that are texts, and the pattern of their values.
TEXTS = {
    "approximate": "none|tanh",
    "equation": r"[a-zA-Z., >-]{1,64}",
    "indexing": "ij|xy",
    "padding_side": "left|right",
    "mode": "constant|reflect|replicate|circular",
    "name": r"[a-zA-Z_]\w{0,255}",
    "padding": "same|valid",
    "rounding_mode": "floor|trunc",
    "unknown": "error|nearest",
}

#: By name, the arguments that have one value at inference: with another, the operator is random or writes to a buffer.
FIXED = {"dropout_p": 0.0, "training": False}
