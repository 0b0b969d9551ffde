// Every kernel on random shapes, beside memory that nobody may touch. Compiled with the sanitizers it stops at the
// first read or write out of bounds and at the first overflow; what they do not see, masked and gathered vectors, ends
// at a page that cannot be read. Arguments: how many shapes, and the seed. Prints how many it ran.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "exports.cpp"

namespace {

std::mt19937_64 source;

int64_t draw(int64_t low, int64_t high) { return low + int64_t(source() % uint64_t(high - low + 1)); }

template <class T>
T any(std::initializer_list<T> choices) {
  return choices.begin()[draw(0, int64_t(choices.size()) - 1)];
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

// `size` bytes on the heap, where the sanitizer watches both sides; or at the end, or at the start, of pages between
// two that cannot be touched, where what is left of the pages holds a pattern.
class Memory {
 public:
  explicit Memory(int64_t size) : size_(size), place_(int(draw(0, 2))) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    if (place_ == 0) {
      start_ = static_cast<uint8_t*>(std::malloc(size));
      if (!start_) fail("out of memory");
    } else {
      inner_ = (size + page - 1) / page * page;
      whole_ = inner_ + 2 * page;
      void* mapped = mmap(nullptr, whole_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (mapped == MAP_FAILED) fail("out of memory");
      pages_ = static_cast<uint8_t*>(mapped);
      mprotect(pages_, page, PROT_NONE);
      mprotect(pages_ + page + inner_, page, PROT_NONE);
      std::memset(pages_ + page, kPattern, inner_);
      start_ = pages_ + page + (place_ == 1 ? inner_ - size : 0);
      slack_ = place_ == 1 ? pages_ + page : start_ + size;
    }
    for (int64_t i = 0; i < size; ++i) start_[i] = uint8_t(source());
  }
  Memory(const Memory&) = delete;
  ~Memory() {
    if (place_ == 0) {
      std::free(start_);
      return;
    }
    for (int64_t i = 0; i < inner_ - size_; ++i)
      if (slack_[i] != kPattern) fail("a kernel wrote beside its result");
    munmap(pages_, whole_);
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(start_);
  }
  // Numbers around 0 instead of any bits, as floats or as bfloat16.
  const Memory& floats(bool narrow) const {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < size_ / (narrow ? 2 : 4); ++i) {
      const float value = normal(source);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (narrow)
        as<uint16_t>()[i] = uint16_t(bits >> 16);
      else
        as<float>()[i] = value;
    }
    return *this;
  }

 private:
  static constexpr uint8_t kPattern = 0xa5;
  int64_t size_, inner_ = 0, whole_ = 0;
  int place_;
  uint8_t *start_ = nullptr, *pages_ = nullptr, *slack_ = nullptr;
};

// A table of quantizers and the rows of a batch, some of them outside it.
class Table {
 public:
  Table(int64_t images, int64_t columns, int64_t most = 255)
      : count_(draw(1, 4)), items_(images > 0 && draw(0, 1) ? images : 1), each_(images > 0 ? images / items_ : 1),
        scales_(4 * count_ * columns), zeros_(8 * count_ * columns), rows_(8 * items_), used_(int(draw(0, 2))) {
    for (int64_t i = 0; i < count_ * columns; ++i) {
      scales_.as<float>()[i] = 0.02f;
      zeros_.as<int64_t>()[i] = columns == 4 && i % 4 == 2 ? 0 : draw(0, most);
    }
    for (int64_t i = 0; i < items_; ++i) rows_.as<int64_t>()[i] = draw(-2, count_ + 1);
  }
  tfmq::Quantizers quantizers() const {
    return {scales_.as<float>(), zeros_.as<int64_t>(), used_ ? rows_.as<int64_t>() : nullptr, count_, each_};
  }

 private:
  int64_t count_, items_, each_;
  Memory scales_, zeros_, rows_;
  int used_;
};

void run_conv() {
  const int narrow = int(draw(0, 1)), vectors = int(draw(1, 4));
  const int64_t kernel[2] = {any<int64_t>({1, 3, 5, 7}), any<int64_t>({1, 3, 5, 7})};
  tfmq::ConvShape s{draw(0, 3), kernel[0] + draw(0, 8), kernel[1] + draw(0, 8), 4 * draw(1, 12), 0, 0,
                    16 * vectors * draw(1, 3), kernel[0], kernel[1], draw(1, 3), draw(1, 3)};
  s.out_height = (s.in_height - kernel[0]) / s.stride_height + 1;
  s.out_width = (s.in_width - kernel[1]) / s.stride_width + 1;
  const int64_t pixels = s.batch * s.out_height * s.out_width, bytes = narrow ? 2 : 4;
  const Memory x(s.batch * s.in_height * s.in_width * s.in_channels);
  const Memory weight(s.out_channels * s.in_channels * kernel[0] * kernel[1]);
  const Memory scale(4 * s.out_channels), bias(4 * s.out_channels), sums(4 * s.out_channels);
  for (int64_t i = 0; i < s.out_channels; ++i) sums.as<int32_t>()[i] = int32_t(draw(-100000, 100000));
  const Table table(s.batch, 1);
  const tfmq::Quantizers by = table.quantizers();
  const Memory residual(pixels * s.out_channels * bytes), out(pixels * s.out_channels * bytes);
  scale.floats(false), bias.floats(false), residual.floats(narrow);
  integer_conv(narrow, vectors, x.as<uint8_t>(), weight.as<int8_t>(), scale.as<float>(), sums.as<int32_t>(),
               bias.as<float>(), draw(0, 1) ? residual.as<void>() : nullptr, out.as<void>(), &s,
               draw(0, 1) ? &by : nullptr);
}

void run_norm() {
  const int narrow = int(draw(0, 1)), quantized = int(draw(0, 1));
  tfmq::NormShape s{draw(0, 3), draw(1, 9), draw(1, 9), 1, {16 * draw(1, 9), any<int64_t>({0, 16, 48, 80})},
                    {0, 0, 0, 0}, 0};
  const int64_t channels = s.channels[0] + s.channels[1];
  s.groups = channels / any<int64_t>({1, 2, 4, 8, 16, channels});
  if (quantized)
    for (int64_t& border : s.padding) border = draw(0, 2);
  s.shift_stride = any<int64_t>({0, channels, channels + 5});
  const int64_t pixels = s.batch * s.height * s.width, bytes = narrow ? 2 : 4;
  const int64_t places = s.batch * (s.height + s.padding[0] + s.padding[2]) * (s.width + s.padding[1] + s.padding[3]);
  const Memory first(pixels * s.channels[0] * bytes), second(pixels * s.channels[1] * bytes);
  const Memory shift(4 * (channels + (s.batch > 1 ? s.batch - 1 : 0) * s.shift_stride));
  const Memory gamma(4 * channels), beta(4 * channels), by_channel(4 * channels), out(places * channels * (quantized ? 1 : 4));
  // Any bits at times: numbers of all sizes, infinities and NaN must not lead anywhere else.
  if (draw(0, 3)) first.floats(narrow), second.floats(narrow), shift.floats(false);
  gamma.floats(false), beta.floats(false), by_channel.floats(false);
  const Table table(s.batch, 1);
  const tfmq::Quantizers by = table.quantizers();
  group_norm(narrow, quantized, int(draw(0, 1)), first.as<void>(), s.channels[1] ? second.as<void>() : nullptr,
             draw(0, 1) ? shift.as<float>() : nullptr, gamma.as<float>(), beta.as<float>(),
             draw(0, 1) ? by_channel.as<float>() : nullptr, out.as<void>(), &s, 1e-5f, &by);
}

void run_image() {
  const int narrow = int(draw(0, 1));
  tfmq::ImageShape s{draw(0, 3), draw(1, 9), draw(1, 9), 16 * draw(1, 9), draw(1, 3), {0, 0, 0, 0}};
  for (int64_t& border : s.padding) border = draw(0, 2);
  const int64_t height = s.height * s.enlarge + s.padding[0] + s.padding[2];
  const int64_t width = s.width * s.enlarge + s.padding[1] + s.padding[3];
  const Memory x(s.batch * s.height * s.width * s.channels * (narrow ? 2 : 4));
  const Memory out(s.batch * height * width * s.channels), by_channel(4 * s.channels);
  if (draw(0, 3)) x.floats(narrow), by_channel.floats(false);
  const Table table(s.batch, 1);
  const tfmq::Quantizers by = table.quantizers();
  quantize_image(narrow, x.as<void>(), draw(0, 1) ? by_channel.as<float>() : nullptr, out.as<uint8_t>(), &s, &by);
}

void run_pointwise() {
  const int narrow = int(draw(0, 1)), vectors = int(draw(1, 4));
  const tfmq::PointwiseShape s{draw(0, 3), draw(1, 70), 16 * draw(1, 12), 16 * vectors * draw(1, 3)};
  const int64_t pixels = s.batch * s.pixels, bytes = narrow ? 2 : 4;
  const Memory x(pixels * s.in_channels * bytes), by_channel(4 * s.in_channels);
  const Memory weight(s.out_channels * s.in_channels);
  const Memory scale(4 * s.out_channels), bias(4 * s.out_channels), sums(4 * s.out_channels);
  for (int64_t i = 0; i < s.out_channels; ++i) sums.as<int32_t>()[i] = int32_t(draw(-100000, 100000));
  const Memory residual(pixels * s.out_channels * bytes), out(pixels * s.out_channels * bytes);
  if (draw(0, 3)) x.floats(narrow), by_channel.floats(false);
  scale.floats(false), bias.floats(false), residual.floats(narrow);
  const Table table(s.batch, 1, 65535);
  const tfmq::Quantizers by = table.quantizers();
  pointwise_conv(narrow, vectors, x.as<void>(), draw(0, 1) ? by_channel.as<float>() : nullptr, weight.as<int8_t>(),
                 scale.as<float>(), sums.as<int32_t>(), bias.as<float>(), draw(0, 1) ? residual.as<void>() : nullptr,
                 out.as<void>(), &s, &by);
}

void run_attention() {
  const int narrow = int(draw(0, 1));
  tfmq::AttentionShape s{};
  s.batch = draw(0, 3), s.key_heads = draw(1, 3), s.heads = s.key_heads * draw(1, 3);
  s.queries = draw(1, 20), s.keys = draw(1, 70), s.depth = 4 * draw(1, 20);
  s.key_batch = draw(0, 1) ? s.batch : 1;
  const int64_t bytes = narrow ? 2 : 4;
  // Heads behind each other or beside each other, and one of all where a stride is 0; rows may have a gap.
  const auto lay_out = [&](int64_t batch, int64_t heads, int64_t rows, int64_t (&strides)[3]) {
    const bool beside = draw(0, 1);
    const int64_t gap = any<int64_t>({0, 4}), wide = (beside ? heads : 1) * s.depth + gap;
    strides[2] = wide, strides[1] = beside ? s.depth : rows * wide, strides[0] = (beside ? 1 : heads) * rows * wide;
    for (int axis = 0; axis < 2; ++axis)
      if (draw(0, 3) == 0) strides[axis] = 0;
    const int64_t last = (batch > 1 ? batch - 1 : 0) * strides[0] + (heads - 1) * strides[1] + (rows - 1) * wide;
    return (last + s.depth) * bytes;
  };
  const Memory query(lay_out(s.batch, s.heads, s.queries, s.query));
  const Memory key(lay_out(s.key_batch, s.key_heads, s.keys, s.key));
  const Memory value(lay_out(s.key_batch, s.key_heads, s.keys, s.value));
  const Memory out(s.batch * s.queries * s.heads * s.depth * bytes);
  query.floats(narrow), key.floats(narrow), value.floats(narrow);
  const Table table(s.batch, 4);
  const tfmq::Quantizers by = table.quantizers();
  integer_attention(narrow, query.as<void>(), key.as<void>(), value.as<void>(), out.as<void>(), &s, 0.3f, &by,
                    int(draw(0, 1)));
}

}  // namespace

int main(int, char** arguments) {
  const int64_t count = std::atoll(arguments[1]);
  source.seed(std::strtoull(arguments[2], nullptr, 10));
  void (*const kernels[])() = {run_conv, run_norm, run_image, run_pointwise, run_attention};
  constexpr int kernel_count = int(std::size(kernels));
  for (int64_t i = 0; i < count; ++i) {
    threads(any<int>({1, 2, 3, 7}));
    kernels[i % kernel_count]();
  }
  // From threads of a caller's own, as two denoisers at once: each call is then a team of one.
#pragma omp parallel for num_threads(2)
  for (int i = 0; i < 2; ++i) {
#pragma omp critical
    for (int again = 0; again < kernel_count; ++again) kernels[again]();
  }
  std::printf("%lld\n", static_cast<long long>(count));
}
