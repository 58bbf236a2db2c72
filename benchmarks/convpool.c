/* A 5x5 convolution without padding and the 2x2 max-pooling behind it as one operation: of four positions only the one
   that wins has a gradient, so that the way back costs a quarter. Rows of the input are padded by 8 numbers or more,
   kernels on the way back to rows of 8. The convolution's output is 24 or 8 wide. */
#include <string.h>

typedef float lanes __attribute__((vector_size(32)));

static lanes get(const float *p) { lanes v; memcpy(&v, p, 32); return v; }
static void set(float *p, lanes v) { memcpy(p, &v, 32); }
static lanes all(float x) { return (lanes){x, x, x, x, x, x, x, x}; }

static void wide(const float *x, const float *w, float *out, int channels, int height, int stride) {
  for (int y = 0; y < 24; y += 4) {
    lanes sum[12];
    for (int i = 0; i < 12; i++) sum[i] = all(0);
    for (int c = 0; c < channels; c++)
      for (int dy = 0; dy < 5; dy++)
        for (int dx = 0; dx < 5; dx++) {
          lanes one = all(w[(c * 5 + dy) * 5 + dx]);
          const float *row = x + (c * height + y + dy) * stride + dx;
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++) {
            sum[3 * j] += one * get(row + j * stride);
            sum[3 * j + 1] += one * get(row + j * stride + 8);
            sum[3 * j + 2] += one * get(row + j * stride + 16);
          }
        }
    for (int j = 0; j < 4; j++)
      for (int k = 0; k < 3; k++) set(out + (y + j) * 24 + 8 * k, sum[3 * j + k]);
  }
}

static void narrow(const float *x, const float *w, float *out, int channels, int height, int stride) {
  lanes sum[8];
  for (int i = 0; i < 8; i++) sum[i] = all(0);
  for (int c = 0; c < channels; c++)
    for (int dy = 0; dy < 5; dy++)
      for (int dx = 0; dx < 5; dx++) {
        lanes one = all(w[(c * 5 + dy) * 5 + dx]);
        const float *row = x + (c * height + dy) * stride + dx;
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) sum[j] += one * get(row + j * stride);
      }
  for (int j = 0; j < 8; j++) set(out + j * 24, sum[j]);
}

/* x (n, channels, height, stride), w (outputs, channels, 5, 5), out (n, outputs, side, out_stride),
   winner (n, outputs, side, side): 0 to 3, with side = (height - 4) / 2 */
void forward(const float *x, const float *w, const float *b, float *out, unsigned char *winner, int n, int channels,
             int outputs, int height, int stride, int out_stride) {
  int side = (height - 4) / 2;
  float map[24 * 24];
  for (int i = 0; i < n; i++)
    for (int o = 0; o < outputs; o++) {
      const float *from = x + (long)i * channels * height * stride;
      if (side == 12) wide(from, w + o * channels * 25, map, channels, height, stride);
      else narrow(from, w + o * channels * 25, map, channels, height, stride);
      float *to = out + ((long)i * outputs + o) * side * out_stride;
      unsigned char *won = winner + ((long)i * outputs + o) * side * side;
      for (int y = 0; y < side; y++)
        for (int k = 0; k < side; k++) {
          const float *at = map + 2 * y * 24 + 2 * k;
          int upper = at[1] > at[0], lower = at[25] > at[24];
          float up = upper ? at[1] : at[0], low = lower ? at[25] : at[24];
          int below = low > up;
          to[y * out_stride + k] = (below ? low : up) + b[o];
          won[y * side + k] = (unsigned char)(below ? 2 + lower : upper);
        }
    }
}

/* w and dw (outputs, channels, 5, 8); dw, db, dx are added to; dx may be missing */
void backward(const float *x, const float *w, const float *g, const unsigned char *winner, float *dw, float *db,
              float *dx, int n, int channels, int outputs, int height, int stride, int g_stride) {
  int side = (height - 4) / 2;
  for (int i = 0; i < n; i++)
    for (int o = 0; o < outputs; o++) {
      const float *from = g + ((long)i * outputs + o) * side * g_stride;
      const unsigned char *won = winner + ((long)i * outputs + o) * side * side;
      for (int y = 0; y < side; y++)
        for (int k = 0; k < side; k++) db[o] += from[y * g_stride + k];
      for (int c = 0; c < channels; c++) {
        const float *in = x + ((long)i * channels + c) * height * stride;
        float *back = dx ? dx + ((long)i * channels + c) * height * stride : 0;
        float *own = dw + (long)(o * channels + c) * 40;
        const float *kernel = w + (long)(o * channels + c) * 40;
        lanes sum[5], rows[5];
        for (int r = 0; r < 5; r++) sum[r] = get(own + 8 * r), rows[r] = get(kernel + 8 * r);
        for (int y = 0; y < side; y++)
          for (int k = 0; k < side; k++) {
            int place = won[y * side + k];
            long at = (2 * y + (place >> 1)) * stride + 2 * k + (place & 1);
            lanes grad = all(from[y * g_stride + k]);
#pragma GCC unroll 5
            for (int r = 0; r < 5; r++) sum[r] += grad * get(in + at + r * stride);
            if (back) {
#pragma GCC unroll 5
              for (int r = 0; r < 5; r++) set(back + at + r * stride, get(back + at + r * stride) + grad * rows[r]);
            }
          }
        for (int r = 0; r < 5; r++) set(own + 8 * r, sum[r]);
      }
    }
}
