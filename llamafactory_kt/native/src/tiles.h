/* AMX: eight tiles of 16 rows and 64 bytes (Intel's manual, volume 1, chapter 18). Tests emulate them.
 *
 *     TILE_CONFIGURE, TILE_RELEASE     what the thread's tiles are from here, and until here
 *     TILE_ZERO(tile)
 *     TILE_LOAD(tile, from, stride)    rows that lie so many bytes apart
 *     TILE_STORE(tile, to, stride)
 *     TILE_MULTIPLY(sums, a, b)        sums[m][n] += a[m][2 k] b[k][2 n] + a[m][2 k + 1] b[k][2 n + 1] over k: bf16 pairs, float sums
 *
 * Tiles are numbers in the source. */
#pragma once
#include <stdint.h>

namespace kt {
namespace {
namespace kernels_ {

struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

const TileConfig WHOLE_TILES = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

}  // namespace kernels_
}  // namespace
}  // namespace kt

#ifdef KT_EMULATED_TILES
#include KT_EMULATED_TILES
#else
#include <immintrin.h>

#define TILE_CONFIGURE() _tile_loadconfig(&WHOLE_TILES)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(tile) _tile_zero(tile)
/* gcc's intrinsic does not say that it reads memory: what was written must be there */
#define TILE_LOAD(tile, from, stride)        \
    do {                                     \
        __asm__ volatile("" ::: "memory");   \
        _tile_loadd(tile, from, stride);     \
    } while (0)
#define TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define TILE_MULTIPLY(sums, a, b) _tile_dpbf16ps(sums, a, b)
#endif
