// The kernels behind plain names, for a test to call with pointers: every form that the compiled programs use.
#include "attention.h"
#include "conv.h"
#include "image.h"
#include "norm.h"
#include "pointwise.h"

using tfmq::bf16;

namespace {

// Calls body with a null pointer to the type of the input: float, or bfloat16 where `narrow`.
template <class F>
void with_type(int narrow, F&& body) {
  if (narrow)
    body(static_cast<bf16*>(nullptr));
  else
    body(static_cast<float*>(nullptr));
}

template <class Out, class Scales>
void conv(int vectors, const uint8_t* x, const int8_t* weight, const Scales& scales, const Out* residual, Out* out,
          const tfmq::ConvShape& shape) {
  switch (vectors) {
    case 1: return tfmq::integer_conv<1, Out>(x, weight, scales, residual, out, shape);
    case 2: return tfmq::integer_conv<2, Out>(x, weight, scales, residual, out, shape);
    case 3: return tfmq::integer_conv<3, Out>(x, weight, scales, residual, out, shape);
    default: return tfmq::integer_conv<4, Out>(x, weight, scales, residual, out, shape);
  }
}

template <class In>
void pointwise(int vectors, const In* x, const float* by, const int8_t* weight, const float* scale, const int32_t* sums,
               const float* bias, const In* residual, In* out, const tfmq::PointwiseShape& shape,
               const tfmq::Quantizers& quantizers) {
  switch (vectors) {
    case 1: return tfmq::pointwise_conv<1>(x, by, weight, scale, sums, bias, residual, out, shape, quantizers);
    case 2: return tfmq::pointwise_conv<2>(x, by, weight, scale, sums, bias, residual, out, shape, quantizers);
    case 3: return tfmq::pointwise_conv<3>(x, by, weight, scale, sums, bias, residual, out, shape, quantizers);
    default: return tfmq::pointwise_conv<4>(x, by, weight, scale, sums, bias, residual, out, shape, quantizers);
  }
}

template <class In, class Out>
void norm(int silu, const In* first, const In* second, const float* shift, const float* gamma, const float* beta,
          const float* by, Out* out, const tfmq::NormShape& shape, float eps, const tfmq::Quantizers& quantizers) {
  if (silu)
    tfmq::group_norm<true>(first, second, shift, gamma, beta, by, out, shape, eps, quantizers);
  else
    tfmq::group_norm<false>(first, second, shift, gamma, beta, by, out, shape, eps, quantizers);
}

}  // namespace

extern "C" {

void threads(int count) { omp_set_num_threads(count); }

// `quantizers` null: the scale and bias hold what one quantizer for all images adds.
void integer_conv(int narrow, int vectors, const uint8_t* x, const int8_t* weight, const float* scale,
                  const int32_t* weight_sum, const float* bias, const void* residual, void* out,
                  const tfmq::ConvShape* shape, const tfmq::Quantizers* quantizers) {
  with_type(narrow, [&](auto* type) {
    using Out = std::remove_pointer_t<decltype(type)>;
    const Out* added = static_cast<const Out*>(residual);
    if (quantizers)
      conv<Out>(vectors, x, weight, tfmq::ScalesByImage{scale, weight_sum, bias, *quantizers}, added,
                static_cast<Out*>(out), *shape);
    else
      conv<Out>(vectors, x, weight, tfmq::SharedScales{scale, bias}, added, static_cast<Out*>(out), *shape);
  });
}

void group_norm(int narrow, int quantized, int silu, const void* first, const void* second, const float* shift,
                const float* gamma, const float* beta, const float* by, void* out, const tfmq::NormShape* shape,
                float eps, const tfmq::Quantizers* quantizers) {
  with_type(narrow, [&](auto* type) {
    using In = std::remove_pointer_t<decltype(type)>;
    const In *one = static_cast<const In*>(first), *two = static_cast<const In*>(second);
    if (quantized)
      norm(silu, one, two, shift, gamma, beta, by, static_cast<uint8_t*>(out), *shape, eps, *quantizers);
    else
      norm(silu, one, two, shift, gamma, beta, nullptr, static_cast<float*>(out), *shape, eps, *quantizers);
  });
}

void quantize_image(int narrow, const void* x, const float* by, uint8_t* out, const tfmq::ImageShape* shape,
                    const tfmq::Quantizers* quantizers) {
  with_type(narrow, [&](auto* type) {
    using In = std::remove_pointer_t<decltype(type)>;
    tfmq::quantize_image(static_cast<const In*>(x), by, out, *shape, *quantizers);
  });
}

// The result and the residual have the type of the input.
void pointwise_conv(int narrow, int vectors, const void* x, const float* by, const int8_t* weight, const float* scale,
                    const int32_t* sums, const float* bias, const void* residual, void* out,
                    const tfmq::PointwiseShape* shape, const tfmq::Quantizers* quantizers) {
  with_type(narrow, [&](auto* type) {
    using In = std::remove_pointer_t<decltype(type)>;
    pointwise(vectors, static_cast<const In*>(x), by, weight, scale, sums, bias, static_cast<const In*>(residual),
              static_cast<In*>(out), *shape, *quantizers);
  });
}

void integer_attention(int narrow, const void* query, const void* key, const void* value, void* out,
                       const tfmq::AttentionShape* shape, float factor, const tfmq::Quantizers* quantizers,
                       int deferred) {
  with_type(narrow, [&](auto* type) {
    using In = std::remove_pointer_t<decltype(type)>;
    tfmq::integer_attention(static_cast<const In*>(query), static_cast<const In*>(key), static_cast<const In*>(value),
                            static_cast<In*>(out), *shape, factor, tfmq::AttentionQuantizers{*quantizers}, deferred != 0);
  });
}

}  // extern "C"
