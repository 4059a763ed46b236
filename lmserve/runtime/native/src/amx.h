// Tiles: the processor's matrix registers. A thread configures them before a product; the kernel grants them once.
#pragma once
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define LM_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace lm {

inline bool ask_for_tiles() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// Tiles 0..3 collect results (two row blocks by two halves of a panel), 4 and 5 are rows of A, 6 and 7 lines of a panel.
class Tiles {
 public:
  // Row blocks of up to 16 rows each.
  void configure(int first, int second) {
    if (first == first_ && second == second_) return;
    first_ = first, second_ = second;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const auto set = [&config](int tile, int rows) { config.bytes[tile] = 64, config.rows[tile] = uint8_t(rows); };
    set(0, first), set(1, first), set(4, first), set(6, 16), set(7, 16);
    set(2, second ? second : 1), set(3, second ? second : 1), set(5, second ? second : 1);
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (first_) _tile_release();
  }

 private:
  int first_ = 0, second_ = 0;
};

}  // namespace lm
#endif
