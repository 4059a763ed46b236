// How rows meet panels: a panel stays in the near caches while all rows meet it, as many at once as sums have registers.
#pragma once
#include <type_traits>

namespace lm {

constexpr int AHEAD = 4096;    // bytes that a panel is fetched before it is used
constexpr long MOST_SUMS = 6;  // rows that meet a panel at once: more would have their sums in memory
constexpr long FEW = 4;        // rows that leave so much time to memory that asking early pays; beyond, processors do it

// The rows in nearly equal parts. The kernel gets their number, whether to fetch ahead, the first row, and the panel.
template <typename Kernel>
inline void sweep(const Weight& w, long m, long begin, long end, const Kernel& kernel) {
  const size_t bytes = panel_bytes(w);
  const char* data = static_cast<const char*>(w.data);
  const long parts = (m + MOST_SUMS - 1) / MOST_SUMS;
  const auto part = [&](auto fetches, long count, long row, long p) {
    const char* panel = data + p * bytes;
    switch (count) {
      case 1: kernel(std::integral_constant<int, 1>{}, fetches, row, panel, p); break;
      case 2: kernel(std::integral_constant<int, 2>{}, fetches, row, panel, p); break;
      case 3: kernel(std::integral_constant<int, 3>{}, fetches, row, panel, p); break;
      case 4: kernel(std::integral_constant<int, 4>{}, fetches, row, panel, p); break;
      case 5: kernel(std::integral_constant<int, 5>{}, fetches, row, panel, p); break;
      default: kernel(std::integral_constant<int, MOST_SUMS>{}, fetches, row, panel, p);
    }
  };
  for (long p = begin; p < end; ++p)
    for (long i = 0, row = 0, count; i < parts; ++i, row += count) {
      count = (m - row + parts - i - 1) / (parts - i);
      if (m <= FEW)
        part(std::true_type{}, count, row, p);
      else
        part(std::false_type{}, count, row, p);
    }
}

}  // namespace lm
