// Preloaded by avx2.py: what the CPU has beyond AVX2 is hidden from whoever asks it with cpuid.
//
// The kernel lets a thread's cpuid fault (arch_prctl(2), ARCH_SET_CPUID; what it starts inherits
// that, what it executes does not, and preloads this again). The fault is answered here.

#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

// of leaf 7: AVX-512 and AMX with all their parts
enum { EBX = 0xdc230000u, ECX = 0x00005842u, EDX = 0x03c0010cu };

typedef int (*Sigaction)(int, const struct sigaction *, struct sigaction *);

static struct sigaction theirs;  // what the program itself would do at a segmentation fault

static Sigaction real(void) { return (Sigaction)dlsym(RTLD_NEXT, "sigaction"); }

static int may_fault(int on) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, !on); }

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)regs[REG_RIP];
    if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {
        if (theirs.sa_handler != SIG_DFL && theirs.sa_handler != SIG_IGN) {
            theirs.sa_sigaction(number, info, context);
        } else {
            real()(number, &theirs, NULL);
            raise(number);  // blocked until this returns
        }
        return;
    }
    unsigned leaf = regs[REG_RAX], part = regs[REG_RCX], a, b, c, d;
    may_fault(0);
    __cpuid_count(leaf, part, a, b, c, d);
    may_fault(1);
    if (leaf == 7 && part == 0)
        b &= ~EBX, c &= ~ECX, d &= ~EDX;
    else if (leaf == 7 || leaf == 0x1d || leaf == 0x1e || leaf == 0x24)  // VNNI, AMX, AVX10
        a = b = c = d = 0;
    regs[REG_RAX] = a, regs[REG_RBX] = b, regs[REG_RCX] = c, regs[REG_RDX] = d;
    regs[REG_RIP] += 2;
}

// Python, GCC and others set a handler of their own, which must not replace this one.
int sigaction(int number, const struct sigaction *action, struct sigaction *old) {
    if (number != SIGSEGV) return real()(number, action, old);
    if (old) *old = theirs;
    if (action) theirs = *action;
    return 0;
}

sighandler_t signal(int number, sighandler_t handler) {
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART}, old;
    return sigaction(number, &action, &old) ? SIG_ERR : old.sa_handler;
}

__attribute__((constructor)) static void hide(void) {
    struct sigaction ours = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    if (real()(SIGSEGV, &ours, &theirs) || may_fault(1)) {
        fputs("error: this CPU, or its kernel, lets no process hide instruction sets\n", stderr);
        _exit(2);
    }
}
