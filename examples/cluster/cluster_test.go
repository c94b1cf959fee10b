// Package cluster has several proxies that share an etcd, to copy from.
package cluster

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// objects reads the manifests. Kubernetes' own types, read strictly, are the schema: a
// field that they don't have, or have with another type, is an error.
func objects(t *testing.T) []runtime.Object {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme, policyv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	files, err := filepath.Glob("kubernetes/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no manifests: %v", err)
	}
	var objects []runtime.Object
	for _, file := range files {
		if filepath.Base(file) == "kustomization.yaml" { // no object of Kubernetes
			continue
		}
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for documents := yaml.NewYAMLReader(bufio.NewReader(f)); ; {
			text, err := documents.Read()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			object, _, err := decoder.Decode(text, nil, nil)
			if err != nil {
				t.Errorf("%s: %v", file, err)
				continue
			}
			objects = append(objects, object)
		}
	}
	return objects
}

// TestManifests checks the manifests against Kubernetes' types, that what they select and
// name is there, and that culvert-proxy knows its flags.
func TestManifests(t *testing.T) {
	sets := map[string]*appsv1.StatefulSet{}
	services := map[string]*corev1.Service{}
	budgets := map[string]*policyv1.PodDisruptionBudget{}
	for _, object := range objects(t) {
		switch o := object.(type) {
		case *appsv1.StatefulSet:
			sets[o.Name] = o
		case *corev1.Service:
			services[o.Name] = o
		case *policyv1.PodDisruptionBudget:
			budgets[o.Name] = o
		default:
			t.Errorf("%T is not looked at here", o)
		}
	}
	selects := func(selector labels.Selector) (found []*appsv1.StatefulSet) {
		for _, set := range sets {
			if selector.Matches(labels.Set(set.Spec.Template.Labels)) {
				found = append(found, set)
			}
		}
		return found
	}
	selector := func(s *metav1.LabelSelector) labels.Selector {
		t.Helper()
		out, err := metav1.LabelSelectorAsSelector(s)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for name, service := range services {
		found := selects(labels.SelectorFromSet(service.Spec.Selector))
		if len(found) != 1 {
			t.Fatalf("the service %s selects %d sets", name, len(found))
		}
		for _, port := range service.Spec.Ports {
			if !hasPort(found[0], port) {
				t.Errorf("the service %s has the port %s, which no container of %s has", name, port.Name, found[0].Name)
			}
		}
	}
	for _, name := range []string{"etcd", "culvert-proxy", "prometheus"} {
		set, budget := sets[name], budgets[name]
		if set == nil || budget == nil {
			t.Fatalf("%s has no set, or no budget", name)
		}
		if found := selects(selector(set.Spec.Selector)); len(found) != 1 || found[0] != set {
			t.Errorf("the set %s does not select its own pods", name)
		}
		if found := selects(selector(budget.Spec.Selector)); len(found) != 1 || found[0] != set {
			t.Errorf("the budget %s does not select the pods of its set", name)
		}
		if s := services[set.Spec.ServiceName]; s == nil || s.Spec.ClusterIP != corev1.ClusterIPNone {
			t.Errorf("the set %s names the service %q, which is none without an address", name, set.Spec.ServiceName)
		}
		for _, spread := range set.Spec.Template.Spec.TopologySpreadConstraints {
			if found := selects(selector(spread.LabelSelector)); len(found) != 1 || found[0] != set {
				t.Errorf("%s spreads other pods than its own", name)
			}
		}
	}
	if t.Failed() {
		return
	}

	// --version comes after all flags were read.
	program := filepath.Join(t.TempDir(), "culvert-proxy")
	if out, err := exec.Command("go", "build", "-o", program, "../../proxy").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	args := sets["culvert-proxy"].Spec.Template.Spec.Containers[0].Args
	if out, err := exec.Command(program, append(args, "--version")...).CombinedOutput(); err != nil {
		t.Errorf("culvert-proxy %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func hasPort(set *appsv1.StatefulSet, want corev1.ServicePort) bool {
	for _, c := range set.Spec.Template.Spec.Containers {
		for _, p := range c.Ports {
			if p.Name == want.TargetPort.StrVal || want.TargetPort.StrVal == "" && p.ContainerPort == want.Port {
				return true
			}
		}
	}
	return false
}

// TestPrometheusConfig has promtool check the configuration.
func TestPrometheusConfig(t *testing.T) {
	promtool := externaltest.Program(t, "promtool", "prometheus")
	if out, err := exec.Command(promtool, "check", "config", "kubernetes/prometheus.yml").CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestScript runs cluster.sh as it stands, until both of its Prometheis see everything.
func TestScript(t *testing.T) {
	externaltest.Program(t, "etcd", "etcd-server")
	externaltest.Program(t, "prometheus", "prometheus")
	externaltest.Program(t, "curl", "curl")
	script := exec.Command("./cluster.sh", "--once")
	script.Env = append(os.Environ(), "PORT="+strconv.Itoa(freePorts(t)), "TMPDIR="+t.TempDir())
	var out bytes.Buffer
	script.Stdout, script.Stderr = &out, &out
	script.WaitDelay = time.Second
	if err := script.Run(); err != nil || !strings.Contains(out.String(), "all of their targets are up") {
		t.Errorf("%v\n%s", err, out.String())
	}
}

// freePorts returns the first of 500 ports of which those that cluster.sh takes are free.
func freePorts(t *testing.T) int {
	t.Helper()
	for first := 20_000 + os.Getpid()%5_000; first < 32_000; first += 500 {
		free := true
		for hundred := range 5 {
			for n := 1; n <= 3; n++ {
				l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(first+100*hundred+n)))
				if err != nil {
					free = false
					continue
				}
				l.Close()
			}
		}
		if free {
			return first
		}
	}
	t.Fatal("no free ports")
	return 0
}
