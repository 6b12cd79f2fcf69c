// SPDX-License-Identifier: Apache-2.0
// Enough of CUDA to run this project's kernels on the host: one block after the other, the 32
// threads of a warp as fibers that meet at __ballot_sync. `kernel<<<grid, block, ...>>>(arguments)`
// is written `on_host::launch(grid, block, [&] { kernel(arguments); })` by simulated_gpu.py.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline char const* cudaGetErrorName(cudaError_t) { return ""; }
inline char const* cudaGetErrorString(cudaError_t) { return ""; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

namespace on_host {

constexpr unsigned kWarp = 32, kStack = 1 << 16;

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  dim3 thread;
  bool done = false, vote = false;
};

class Warp {
 public:
  static Warp& current() {
    static thread_local Warp warp;
    return warp;
  }

  // Runs all threads to their end; they stop together at each ballot on the way.
  void run(std::function<void()> const& kernel, std::vector<dim3> const& threads) {
    kernel_ = &kernel;
    for (size_t l = 0; l < threads.size(); ++l) start(lanes_[l], threads[l]);
    for (size_t done = 0; done == 0;) {
      unsigned votes = 0;
      for (size_t l = 0; l < threads.size(); ++l) {
        resume(lanes_[l]);
        done += lanes_[l].done;
        votes |= unsigned(lanes_[l].vote) << l;
      }
      if (done != 0 && done != threads.size()) {
        throw std::runtime_error("a thread of a warp ended while others were at __ballot_sync");
      }
      ballot_ = votes;
    }
  }

  unsigned ballot(bool vote) {
    Lane& lane = *running_;
    lane.vote = vote;
    swapcontext(&lane.context, &scheduler_);
    return ballot_;
  }

 private:
  static void enter() {
    Warp& warp = current();
    (*warp.kernel_)();
    warp.running_->done = true;
  }
  void start(Lane& lane, dim3 thread) {
    lane.thread = thread;
    lane.done = lane.vote = false;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = lane.stack.size();
    lane.context.uc_link = &scheduler_;
    makecontext(&lane.context, &Warp::enter, 0);
  }
  void resume(Lane& lane) {
    running_ = &lane;
    threadIdx = lane.thread;
    swapcontext(&scheduler_, &lane.context);
  }

  std::vector<Lane> lanes_ = std::vector<Lane>(kWarp);
  ucontext_t scheduler_;
  Lane* running_ = nullptr;
  unsigned ballot_ = 0;
  std::function<void()> const* kernel_ = nullptr;
};

inline void launch(dim3 grid, dim3 block, std::function<void()> const& kernel) {
  gridDim = grid;
  blockDim = block;
  unsigned const n_threads = block.x * block.y;
  for (unsigned b = 0; b < grid.x * grid.y; ++b) {
    blockIdx = {b % grid.x, b / grid.x};
    for (unsigned first = 0; first < n_threads; first += kWarp) {
      std::vector<dim3> threads;
      for (unsigned t = first; t < first + kWarp && t < n_threads; ++t) {
        threads.emplace_back(t % block.x, t / block.x);
      }
      Warp::current().run(kernel, threads);
    }
  }
}

}  // namespace on_host

inline unsigned __ballot_sync(unsigned, bool vote) { return on_host::Warp::current().ballot(vote); }
