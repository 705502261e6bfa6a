/* The instructions of tiles.h in plain C, for CPUs without AMX: registers and configuration of each thread, and the sums in the order and precision
 * of TDPBF16PS (Intel's manual, volume 2). What the CPU would refuse (#UD) ends the program. */
#pragma once
#include <float.h>
#include <math.h>
#include <string.h>

namespace kt {
namespace {
namespace kernels_ {

struct EmulatedTiles {
    TileConfig config;
    uint8_t registers[8][16][64];

    void configure(const TileConfig &given) {
        if (given.palette != 1 || given.start_row) __builtin_trap();
        memset(this, 0, sizeof *this);
        config = given;
    }
    void release() { memset(this, 0, sizeof *this); }

    void use(int tile) const {
        if (config.palette != 1 || !config.rows[tile] || !config.row_bytes[tile]) __builtin_trap();
    }
    void zero(int tile) {
        use(tile);
        memset(registers[tile], 0, sizeof registers[tile]);
    }
    void load(int tile, const void *from, int64_t stride) {
        zero(tile);
        for (int row = 0; row < config.rows[tile]; row++)
            memcpy(registers[tile][row], static_cast<const char *>(from) + row * stride, config.row_bytes[tile]);
    }
    void store(int tile, void *to, int64_t stride) const {
        use(tile);
        for (int row = 0; row < config.rows[tile]; row++)
            memcpy(static_cast<char *>(to) + row * stride, registers[tile][row], config.row_bytes[tile]);
    }

    /* To zero what is no normal number, of factors and of sums: DAZ and FTZ are set. */
    static float flushed(float v) { return fabsf(v) < FLT_MIN ? copysignf(0, v) : v; }
    static float factor(uint16_t bits) {
        const uint32_t wide = uint32_t(bits) << 16;
        float found;
        memcpy(&found, &wide, sizeof found);
        return flushed(found);
    }

    void multiply(int to, int a, int b) {
        use(to), use(a), use(b);
        const int columns = config.row_bytes[to] / 4, pairs = config.row_bytes[a] / 4;
        if (config.rows[to] != config.rows[a] || config.row_bytes[to] != config.row_bytes[b] || pairs != config.rows[b]) __builtin_trap();
        if (to == a || to == b || a == b) __builtin_trap();
        float second[16][2][16];
        for (int k = 0; k < pairs; k++) {
            uint16_t words[16][2];
            memcpy(words, registers[b][k], sizeof words);
            for (int n = 0; n < columns; n++)
                for (int half = 0; half < 2; half++) second[k][half][n] = factor(words[n][half]);
        }
        for (int m = 0; m < config.rows[to]; m++) {
            float sums[2][16] = {}, out[16];
            uint16_t first[16][2];
            memcpy(first, registers[a][m], sizeof first), memcpy(out, registers[to][m], sizeof out);
            for (int k = 0; k < pairs; k++)
                for (int half = 0; half < 2; half++) {
                    const float one = factor(first[k][half]);
                    for (int n = 0; n < columns; n++) sums[half][n] = flushed(__builtin_fmaf(one, second[k][half][n], sums[half][n]));
                }
            for (int n = 0; n < columns; n++) out[n] = flushed(flushed(out[n]) + flushed(sums[0][n] + sums[1][n]));
            memcpy(registers[to][m], out, sizeof out);
        }
    }
};

thread_local EmulatedTiles emulated;

}  // namespace kernels_
}  // namespace
}  // namespace kt

#define TILE_CONFIGURE() emulated.configure(WHOLE_TILES)
#define TILE_RELEASE() emulated.release()
#define TILE_ZERO(tile) emulated.zero(tile)
#define TILE_LOAD(tile, from, stride) emulated.load(tile, from, stride)
#define TILE_STORE(tile, to, stride) emulated.store(tile, to, stride)
#define TILE_MULTIPLY(sums, a, b) emulated.multiply(sums, a, b)
